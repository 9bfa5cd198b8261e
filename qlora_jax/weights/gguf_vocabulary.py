"""Builds the tokenizer that a GGUF file's metadata describe.

`tokenizer.ggml.model` is the kind. `gpt2` is byte-level BPE; `tokenizer.ggml.pre` names the way it
splits text before merging. `llama` is SentencePiece BPE; its merges follow from the scores of the
pieces (Llama) or from their order (Gemma).
"""

from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from qlora_jax import errors
from qlora_jax.weights import gguf_header
from qlora_jax.weights import tokenizer as tokenizer_lib

# Token types.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_SPACE = "\u2581"  # SentencePiece's character for a space

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_REST}"

# Values of `tokenizer.ggml.pre`, grouped by their way of splitting.
_GPT2_NAMES = ("gpt-2", "gpt2")
_DIGIT_NAMES = ("smollm", "starcoder", "refact")  # GPT-2's words, each digit separate
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen")
_PRE = (*_GPT2_NAMES, *_DIGIT_NAMES, *_LLAMA3_NAMES, *_QWEN2_NAMES)


def tokenizer(header: gguf_header.Header) -> tokenizer_lib.Tokenizer:
  """Builds the tokenizer.

  Raises:
    UserError: the metadata have no vocabulary, are inconsistent, or name an unsupported kind.
  """
  kind = header.get("tokenizer.ggml.model", str)
  tokens = header.get("tokenizer.ggml.tokens", list)
  types = header.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
  if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
    raise errors.UserError(
      f"{header.path}: {len(tokens)} tokens with {len(types)} token types, or tokens not text"
    )
  roles = {
    role: _special(header, tokens, key)
    for role, key in (
      ("bos_token", "bos_token_id"),
      ("eos_token", "eos_token_id"),
      ("pad_token", "padding_token_id"),
      ("unk_token", "unknown_token_id"),
    )
  }
  try:
    if kind == "gpt2":
      backend, add_bos = _byte_level(header, tokens)
    elif kind == "llama":
      backend, add_bos = _sentencepiece(header, tokens, types, roles["unk_token"]), True
    else:
      raise errors.UserError(
        f"{header.path}: the tokenizer model {kind!r} is not supported; supported: gpt2, llama"
      )
  except errors.UserError:
    raise
  except Exception as error:  # the library raises plain Exceptions
    raise errors.UserError(f"{header.path}: damaged vocabulary: {error}") from None
  for special, added_type in ((True, _CONTROL), (False, _USER_DEFINED)):
    added_tokens = [
      token
      for token, token_type in zip(tokens, types, strict=True)
      if token_type == added_type and token
    ]
    backend.add_tokens(
      [tokenizers.AddedToken(token, normalized=False, special=special) for token in added_tokens]
    )
  add_bos_eos = [
    header.get(f"tokenizer.ggml.add_{token}_token", bool, default)
    for token, default in (("bos", add_bos), ("eos", False))
  ]
  template = header.metadata.get("tokenizer.chat_template")
  return tokenizer_lib.finish(backend, str(header.path), roles, template, add_bos_eos)


def _byte_level(header: gguf_header.Header, tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
  """The pipeline, and the default of adding bos, for files without that key."""
  architecture = header.get("general.architecture", str)
  default = "gpt-2" if architecture == "gpt2" else None
  pre = header.get("tokenizer.ggml.pre", str, default)
  if pre not in _PRE:
    raise errors.UserError(
      f"{header.path}: the pre-tokenizer {pre!r} is not supported; supported: {', '.join(_PRE)}"
    )
  merges = [tuple(merge.split(" ")) for merge in header.get("tokenizer.ggml.merges", list)]
  llama3 = pre in _LLAMA3_NAMES
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: index for index, token in enumerate(tokens)},
      merges=merges,
      ignore_merges=llama3,  # a word that is one token is not merged from parts
    )
  )
  backend.decoder = decoders.ByteLevel()
  words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  if pre in _GPT2_NAMES:
    backend.pre_tokenizer = words
  elif pre in _DIGIT_NAMES:
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
  else:
    split = tokenizers.Regex(_LLAMA3 if llama3 else _QWEN2)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
      [pre_tokenizers.Split(split, behavior="isolated"), letters]
    )
  if pre in _QWEN2_NAMES:
    backend.normalizer = normalizers.NFC()
  return backend, llama3


def _sentencepiece(
  header: gguf_header.Header, tokens: list[str], types: list[int], unknown: str | None
) -> tokenizers.Tokenizer:
  gemma = header.get("general.architecture", str).startswith("gemma")
  if gemma:
    # Runs of spaces are stored as spaces. The order of the pieces is the merge order.
    tokens = [_SPACE * len(t) if " " in t and not t.strip() else t for t in tokens]
    scores = [-float(index) for index in range(len(tokens))]
  else:
    scores = header.get("tokenizer.ggml.scores", list)
  if len(scores) != len(tokens):
    raise errors.UserError(f"{header.path}: {len(tokens)} tokens with {len(scores)} scores")
  vocab = {token: index for index, token in enumerate(tokens)}
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=_merges(vocab, tokens, types, scores),
      unk_token=unknown,
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  decoder: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  if header.get("tokenizer.ggml.add_space_prefix", bool, not gemma):
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
      replacement=_SPACE, prepend_scheme="first", split=False
    )
    decoder.append(decoders.Strip(content=" ", left=1))
  else:
    backend.normalizer = normalizers.Replace(" ", _SPACE)
  backend.decoder = decoders.Sequence(decoder)
  return backend


def _merges(
  vocab: dict[str, int], tokens: list[str], types: list[int], scores: list[float]
) -> list[tuple[str, str]]:
  """All pairs of pieces that join to a third piece, sorted by the third piece's score."""
  pairs = []
  for token, kind, score in zip(tokens, types, scores, strict=True):
    if kind in (_UNKNOWN, _CONTROL, _BYTE):
      continue
    splits = [(token[:i], token[i:]) for i in range(1, len(token))]
    valid_splits = [(left, right) for left, right in splits if left in vocab and right in vocab]
    for left, right in sorted(valid_splits, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])):
      pairs.append((-score, -len(left), -len(right), left, right))
  pairs.sort(key=lambda pair: pair[:3])
  return [(left, right) for *_, left, right in pairs]


def _special(header: gguf_header.Header, tokens: list[str], key: str) -> str | None:
  if f"tokenizer.ggml.{key}" not in header.metadata:
    return None
  index = header.get(f"tokenizer.ggml.{key}", int)
  if not 0 <= index < len(tokens):
    raise errors.UserError(
      f"{header.path}: tokenizer.ggml.{key} is {index}, beyond the {len(tokens)} tokens"
    )
  return tokens[index]
