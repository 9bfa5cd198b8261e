"""Token for token against transformers: trained tokenizers in folders, and SmolLM2's."""

import json

import gguf
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import normalizers, pre_tokenizers

from qlora_jax import errors
from qlora_jax.instructions import wheels
from qlora_jax.weights import gguf_header, gguf_vocabulary, sources
from qlora_jax.weights import tokenizer as tokenizer_lib

BASE = {
  "tokenizer_class": "PreTrainedTokenizerFast",
  "bos_token": "<|im_start|>",
  "eos_token": "<|im_end|>",
  "pad_token": "<|endoftext|>",
}


def _folder(path, backend, config):
  path.mkdir(exist_ok=True)
  backend.save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(json.dumps(config))
  return path


def _agree(ours, theirs, texts):
  for text in texts:
    for add in (False, True):
      expected = theirs.encode(text, add_special_tokens=add)
      assert ours.encode(text, add_special_tokens=add) == expected, text
      for skip in (False, True):
        decoded = theirs.decode(
          expected, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
        assert ours.decode(expected, skip_special_tokens=skip) == decoded, text
  for role in ("bos", "eos", "pad"):
    assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_token_id")
    assert getattr(ours, f"{role}_token") == getattr(theirs, f"{role}_token")
  assert ours.size == len(theirs)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"add_bos_token": True},
    {"add_bos_token": True, "add_eos_token": True},
    {"add_bos_token": False, "add_eos_token": True},
    {"bos_token": {"content": "<|im_start|>", "__type": "AddedToken", "lstrip": False}},
    {"pad_token": None},
    {"pad_token": "<pad:new one>"},
    {
      "added_tokens_decoder": {
        "600": {"content": "<tool>", "special": False, "normalized": False},
        "601": {"content": "<secret>", "special": True, "normalized": False, "rstrip": True},
      }
    },
  ],
)
def test_byte_level_folder_matches_transformers(tmp_path, bpe, texts, changes):
  assert bpe.get_vocab_size() == 600
  folder = _folder(tmp_path / "t", bpe, BASE | changes)
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  texts = (*texts, "use <tool> and <secret>   now", "<pad:new one>x")
  _agree(tokenizer_lib.from_folder(folder), theirs, texts)


@pytest.mark.parametrize("explicit", [{}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_sentencepiece_folder_matches_transformers(tmp_path, sentencepiece, texts, explicit):
  config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | explicit
  config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
  folder = _folder(tmp_path / "t", sentencepiece, config)
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  ours = tokenizer_lib.from_folder(folder)
  # The pipeline decides about bos; the config is ignored.
  assert ours.encode("a")[0] == 1
  _agree(ours, theirs, texts)


def test_padding_and_truncation_of_the_file_are_off(tmp_path, bpe, texts):
  saved = tokenizers.Tokenizer.from_str(bpe.to_str())
  saved.enable_truncation(4)
  saved.enable_padding(length=16)
  folder = _folder(tmp_path / "t", saved, BASE)
  ours = tokenizer_lib.from_folder(folder)
  _agree(ours, transformers.AutoTokenizer.from_pretrained(folder), texts)
  assert ours.encode_batch(texts) == [ours.encode(text) for text in texts]


def test_special_tokens_map_is_read_without_a_config(tmp_path, bpe):
  folder = _folder(tmp_path / "t", bpe, {})
  (folder / "tokenizer_config.json").unlink()
  (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
  ours = tokenizer_lib.from_folder(folder)
  assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, 2, None)
  assert ours.special_ids == {0, 1, 2}


def test_chat_template_is_found_in_its_places(tmp_path, bpe):
  folder = _folder(tmp_path / "t", bpe, BASE)
  assert tokenizer_lib.from_folder(folder).chat_template is None
  named = [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "A"}]
  _folder(folder, bpe, BASE | {"chat_template": named})
  assert tokenizer_lib.from_folder(folder).chat_template == "A"
  (folder / "chat_template.jinja").write_text("C\n")
  assert tokenizer_lib.from_folder(folder).chat_template == "C\n"


def test_fingerprint_changes_with_what_matters(tmp_path, bpe):
  configs = (BASE, BASE, BASE | {"eos_token": "<|endoftext|>"}, BASE | {"chat_template": "x"})
  prints = [
    tokenizer_lib.from_folder(_folder(tmp_path / "t", bpe, config)).fingerprint
    for config in configs
  ]
  assert prints[0] == prints[1]
  assert len(set(prints)) == 3


def test_lone_surrogate_is_replaced(tmp_path, bpe):
  ours = tokenizer_lib.from_folder(_folder(tmp_path / "t", bpe, BASE))
  assert ours.decode(ours.encode("a\ud800b")) == "a?b"


def test_vocabulary_that_does_not_fit_is_refused(tmp_path, bpe):
  ours = tokenizer_lib.from_folder(_folder(tmp_path / "t", bpe, BASE))
  ours.check_vocab(600)
  ours.check_vocab(50_000)
  with pytest.raises(errors.UserError, match=r"600 ids.*vocabulary of 599"):
    ours.check_vocab(599)


def test_damaged_folders_are_refused(tmp_path, bpe):
  with pytest.raises(errors.UserError, match=r"has no tokenizer\.json"):
    tokenizer_lib.from_folder(tmp_path)
  folder = _folder(tmp_path / "t", bpe, BASE)
  data = (folder / "tokenizer.json").read_bytes()
  (folder / "tokenizer.json").write_bytes(data[: len(data) // 2])
  with pytest.raises(errors.UserError, match=r"tokenizer\.json: is not a tokenizer") as caught:
    tokenizer_lib.from_folder(folder)
  assert "\n" not in str(caught.value)
  (folder / "tokenizer.json").write_bytes(data)
  (folder / "tokenizer_config.json").write_text("{")
  with pytest.raises(errors.UserError, match=r"tokenizer_config\.json: is not JSON"):
    tokenizer_lib.from_folder(folder)
  wrong = BASE | {"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}
  _folder(folder, bpe, wrong)
  with pytest.raises(errors.UserError, match="the id 7"):
    tokenizer_lib.from_folder(folder)


@pytest.fixture(scope="module")
def smollm2_theirs():
  """transformers reads the vocabulary; it does not know the name `smollm` of the pre-tokenizer,
  so the published pre-tokenizer (single digits, then GPT-2's words) replaces it."""
  path = wheels.find(*sources.BUILT_IN["smollm2-135m-instruct"])
  theirs = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
  theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
  )
  return theirs


def _random_texts(count=300):
  """Random letters of many scripts, digits, spaces and special tokens, from a fixed seed."""
  rng = np.random.default_rng(0)
  ranges = [(32, 127), (9, 14), (48, 58), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xE00)]
  ranges += [(0x2000, 0x2100), (0x3040, 0x3100), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
  texts = []
  for _ in range(count):
    parts = []
    for _ in range(rng.integers(1, 12)):
      low, high = ranges[rng.integers(len(ranges))]
      parts.append("".join(map(chr, rng.integers(low, high, rng.integers(1, 8)))))
      parts.append(rng.choice([" ", "  ", "", "\n", "<|im_end|>", "<|endoftext|>", " the "]))
    texts.append("".join(parts))
  return texts


def test_smollm2_matches_transformers(smollm2, smollm2_theirs, texts):
  texts = (*texts, *_random_texts())
  ours = smollm2.tokenizer()
  _agree(ours, smollm2_theirs, texts)
  assert ours.size == 49152
  assert len(ours.special_ids) == 17


def test_smollm2_ids_are_the_published_ones(smollm2):
  ours = smollm2.tokenizer()
  assert ours.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]
  assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 2)
  # Digits are single tokens, and the spaces before them stay together.
  assert [ours.decode([i]) for i in ours.encode("a  123")] == ["a", "  ", "1", "2", "3"]


def test_smollm2_decoding_restores_the_text(smollm2, texts):
  ours = smollm2.tokenizer()
  for text in (*texts, *_random_texts(50)):
    assert ours.decode(ours.encode(text)) == text


# GGUF vocabularies, written by the tests, against the original tokenizer.


def _write(path, architecture, model, tokens, types, **fields):
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_tokenizer_model(model)
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  for name, value in fields.items():
    getattr(writer, f"add_{name}")(value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return path


def _tables(backend):
  control = {token.content for token in backend.get_added_tokens_decoder().values()}
  vocab = sorted(backend.get_vocab(), key=backend.get_vocab().get)
  types = [3 if token in control else 6 if token.startswith("<0x") else 1 for token in vocab]
  merges = [tuple(m) for m in json.loads(backend.to_str())["model"]["merges"]]
  return vocab, types, merges


PUBLISHED = {
  # The same pipeline as in the model's tokenizer.json.
  "gpt-2": pre_tokenizers.ByteLevel(False),
  "smollm": pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
  ),
  "llama-bpe": pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(
        tokenizers.Regex(
          r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        "isolated",
      ),
      pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
  ),
  "qwen2": pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(
        tokenizers.Regex(
          r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        "isolated",
      ),
      pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
  ),
}


@pytest.mark.parametrize("pre", sorted(PUBLISHED))
def test_byte_level_gguf_matches_its_origin(tmp_path, bpe, texts, pre):
  origin = tokenizers.Tokenizer.from_str(bpe.to_str())
  origin.pre_tokenizer = PUBLISHED[pre]
  if pre == "qwen2":
    origin.normalizer = normalizers.NFC()
  tokens, types, merges = _tables(bpe)
  path = _write(
    *(tmp_path / "m.gguf", "llama", "gpt2", tokens, types),
    tokenizer_pre=pre,
    token_merges=[" ".join(merge) for merge in merges],
    bos_token_id=1,
    eos_token_id=2,
  )
  ours = gguf_vocabulary.tokenizer(gguf_header.read(path))
  for text in texts:
    expected = origin.encode(text).ids
    assert ours.encode(text, add_special_tokens=False) == expected, text
    # Llama 3 adds bos even if the file does not set add_bos_token.
    assert ours.encode(text) == [1] * (pre == "llama-bpe") + expected
    assert ours.decode(expected) == origin.decode(expected, skip_special_tokens=False)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_sentencepiece_gguf_matches_transformers(tmp_path, sentencepiece, texts, architecture):
  tokens, types, _ = _tables(sentencepiece)
  types[0] = 2
  path = _write(
    *(tmp_path / "m.gguf", architecture, "llama", tokens, types),
    token_scores=[-float(index) for index in range(len(tokens))],
    bos_token_id=1,
    eos_token_id=2,
    unk_token_id=0,
    add_space_prefix=architecture == "llama",
    add_bos_token=True,
  )
  from transformers.integrations import gguf as theirs_lib

  kind, table, config = theirs_lib.get_gguf_tokenizer(str(path))
  theirs, _ = theirs_lib.convert_gguf_tokenizer(kind, table)
  assert config["add_bos_token"]
  ours = gguf_vocabulary.tokenizer(gguf_header.read(path))
  for text in texts:
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, add_special_tokens=False) == expected, text
    assert ours.encode(text) == [1, *expected]
    assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=False)


@pytest.mark.parametrize(
  ("fields", "reason"),
  [
    ({"model": "bert"}, "'bert' is not supported"),
    ({"tokenizer_pre": "unheard-of"}, "'unheard-of' is not supported"),
    ({"tokenizer_pre": None}, "no tokenizer.ggml.pre"),
    ({"eos_token_id": 9999}, "beyond the 600 tokens"),
    ({"token_merges": None}, "no tokenizer.ggml.merges"),
    ({"token_merges": ["never seen"]}, "damaged vocabulary"),
    ({"types": [1, 1]}, "600 tokens with 2 token types"),
  ],
)
def test_unusable_gguf_vocabularies_are_refused(tmp_path, bpe, fields, reason):
  tokens, types, merges = _tables(bpe)
  vocabulary = {
    "model": "gpt2",
    "types": types,
    "tokenizer_pre": "smollm",
    "token_merges": [" ".join(merge) for merge in merges],
    "eos_token_id": 2,
  } | fields
  model, types = vocabulary.pop("model"), vocabulary.pop("types")
  path = _write(
    *(tmp_path / "m.gguf", "llama", model, tokens, types),
    **{name: value for name, value in vocabulary.items() if value is not None},
  )
  with pytest.raises(errors.UserError) as caught:
    gguf_vocabulary.tokenizer(gguf_header.read(path))
  assert reason in str(caught.value)
  assert "\n" not in str(caught.value)
