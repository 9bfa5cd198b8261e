"""Small real tokenizers and test texts, created once per session."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from qlora_jax.weights import sources

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Unicode, combining marks, emoji, numbers, whitespace of all kinds, special tokens, code.
TEXTS = (
  "",
  " ",
  "Hello, world!",
  "  two leading spaces and two trailing  ",
  "tabs\tand\nnewlines\r\n\r\nand   runs    of     spaces\n\n\n",
  "In 1999, 3.14159 and 1,234,567 were numbers; x2 = 10**-3.",
  "a  12 b   345\n 6\t7",
  "I'm sure they'll say it's what we've done, don't you'd THINK'S",
  "naïve café — “quotes” … ½ ² Ⅷ ①②",
  "e\u0301 versus é; ﬁ ligature; Å Å",
  "Привет, мир! Γειά σου Κόσμε. 你好，世界。こんにちは 한국어 مرحبا שלום हिन्दी ไทย",
  "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽",
  "zero\u200bwidth\u00a0nbsp\u2003em\ufeffbom \x00 \x7f",
  "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
  "text<|im_end|>text <|im_start|> <|im_sta rt|> <|im_end|",
  "def f(x):\n    return {k: v**2 for k, v in x.items()}  # comment\n",
  "https://example.org/a_b?c=d&e=%20 user@example.org $100 #tag 50%",
  "word " * 50,
  "x" * 100,
)

CORPUS = [text for text in TEXTS if "im_" not in text] * 3 + [
  f"the number {n} is followed by {n + 1}, not by {n * 7}" for n in range(40)
]


def train_bpe(vocab_size: int = 600) -> tokenizers.Tokenizer:
  """A byte-level BPE that learnt digits one by one, with three special tokens at ids 0 to 2."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
  )
  backend.decoder = decoders.ByteLevel()
  backend.post_processor = processors.ByteLevel(trim_offsets=False)
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(CORPUS, trainer)
  return backend


@pytest.fixture(scope="session")
def bpe():
  return train_bpe()


@pytest.fixture(scope="session")
def sentencepiece():
  """A BPE with byte fallback as in Llama 2; its post-processor adds bos."""
  backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
  backend.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
  backend.train_from_iterator(CORPUS, trainer)
  backend.post_processor = processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
  )
  # Bytes are ordinary tokens; only the first three are special.
  state = json.loads(backend.to_str())
  state["added_tokens"] = state["added_tokens"][:3]
  return tokenizers.Tokenizer.from_str(json.dumps(state))


@pytest.fixture(scope="session")
def smollm2():
  return sources.open_source("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def texts():
  return TEXTS
