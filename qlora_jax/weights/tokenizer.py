"""Converts text to token ids and back, with the `tokenizers` library.

A tokenizer consists of the pipeline (from `tokenizer.json` or GGUF metadata), the special tokens
(begin, end, padding, unknown) and the chat template.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import processors

from qlora_jax import errors

PIPELINE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TOKEN_MAP = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer; never pads and never truncates.

  Attributes:
    backend: the pipeline. It maps special tokens in a text to their ids.
    origin: the tokenizer's file, for messages.
    bos_token, eos_token, pad_token, unk_token: text of the special tokens, or None.
    chat_template: Jinja source, or None.
  """

  backend: tokenizers.Tokenizer
  origin: str
  bos_token: str | None = None
  eos_token: str | None = None
  pad_token: str | None = None
  unk_token: str | None = None
  chat_template: str | None = None

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text.

    Args:
      text: any text. Lone surrogates are replaced, because they have no UTF-8 form.
      add_special_tokens: True adds the tokens that the model expects around a text, such as a first
        `bos_token`. A rendered chat already has these tokens: encode it with False.
    """
    return self.backend.encode(_clean(text), add_special_tokens=add_special_tokens).ids

  def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of several texts, as from `encode`; uses all cores."""
    cleaned = [_clean(text) for text in texts]
    encoded = self.backend.encode_batch(cleaned, add_special_tokens=add_special_tokens)
    return [item.ids for item in encoded]

  def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
    """Text of token ids; bytes that are not UTF-8 become U+FFFD. All spaces are kept."""
    return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

  def token_id(self, token: str | None) -> int | None:
    """Id of a token, by its text; None if there is no such token."""
    return None if token is None else self.backend.token_to_id(token)

  @property
  def bos_id(self) -> int | None:
    return self.token_id(self.bos_token)

  @property
  def eos_id(self) -> int | None:
    return self.token_id(self.eos_token)

  @property
  def pad_id(self) -> int | None:
    return self.token_id(self.pad_token)

  @functools.cached_property
  def size(self) -> int:
    """The highest id plus one, including added tokens."""
    return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

  @functools.cached_property
  def special_ids(self) -> frozenset[int]:
    """Ids that `skip_special_tokens` drops."""
    added = self.backend.get_added_tokens_decoder()
    return frozenset(index for index, token in added.items() if token.special)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 that changes with the pipeline, the special tokens or the chat template."""
    rest = [getattr(self, role) for role in _ROLES] + [self.chat_template]
    return hashlib.sha256((self.backend.to_str() + json.dumps(rest)).encode()).hexdigest()

  def check_vocab(self, vocab_size: int) -> None:
    """Checks that a model's embedding has a row for every token id.

    More rows are allowed: many models pad their vocabulary.

    Raises:
      UserError: `vocab_size` is below `size`.
    """
    if self.size > vocab_size:
      token = self.backend.id_to_token(self.size - 1)
      raise errors.UserError(
        f"{self.origin}: the tokenizer has {self.size} ids (the last is {token!r}), the model a "
        f"vocabulary of {vocab_size}; they do not match"
      )


def from_folder(folder: pathlib.Path) -> Tokenizer:
  """The tokenizer of a Hugging Face folder.

  Reads `tokenizer.json` and, if they exist, `tokenizer_config.json`, `special_tokens_map.json` and
  `chat_template.jinja`.

  Raises:
    UserError: `tokenizer.json` is missing, or one of the files is damaged or contradicts another.
  """
  path = folder / PIPELINE
  if not path.is_file():
    raise errors.UserError(
      f"{folder}: has no {PIPELINE}; transformers' AutoTokenizer writes one with save_pretrained"
    )
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises plain Exceptions
    raise errors.UserError(f"{path}: is not a tokenizer: {_first_line(error)}") from None
  config = _optional_json(folder / TOKEN_MAP) | _optional_json(folder / CONFIG)
  _add_tokens(backend, config.get("added_tokens_decoder") or {}, folder / CONFIG)
  roles = {role: _content(config.get(role)) for role in _ROLES}
  template = _template(folder, config)
  # `add_bos_token` of the config is ignored: tokenizer.json has a rule for special tokens, and
  # transformers uses that rule too.
  return finish(backend, str(path), roles, template, None)


def finish(
  backend: tokenizers.Tokenizer,
  origin: str,
  roles: dict[str, str | None],
  template: str | None,
  add: Sequence[bool | None] | None,
) -> Tokenizer:
  """Registers the special tokens and sets the tokens that are added around a text.

  Args:
    backend: the pipeline, changed in place.
    origin: the tokenizer's file, for messages.
    roles: text by role: `bos_token`, `eos_token`, `pad_token`, `unk_token`.
    template: the chat template, or None.
    add: whether to add bos before and eos after a text; None keeps the pipeline's rule.
  """
  known_tokens = {token.content for token in backend.get_added_tokens_decoder().values()}
  backend.add_special_tokens(
    [
      tokenizers.AddedToken(token, normalized=False, special=True)
      for token in dict.fromkeys(roles.values())
      if token and token not in known_tokens
    ]
  )
  if add is not None:
    added_tokens = {
      name: roles[role]
      for name, role, is_added in (("bos", "bos_token", add[0]), ("eos", "eos_token", add[1]))
      if is_added and roles.get(role)
    }
    # "bos" and "eos" replace the token texts: a template cannot contain a text with a colon.
    backend.post_processor = processors.TemplateProcessing(
      single=[name for name in ("bos", "$A", "eos") if name == "$A" or name in added_tokens],
      special_tokens=[
        {"id": name, "ids": [backend.token_to_id(token)], "tokens": [token]}
        for name, token in added_tokens.items()
      ],
    )
  backend.no_padding()
  backend.no_truncation()
  return Tokenizer(backend, origin, chat_template=template, **roles)


def _add_tokens(
  backend: tokenizers.Tokenizer, entries: dict[str, Any], origin: pathlib.Path
) -> None:
  """Adds the tokens that `tokenizer_config.json` lists and `tokenizer.json` lacks."""
  known_tokens = {token.content for token in backend.get_added_tokens_decoder().values()}
  try:
    ordered = sorted((int(index), entry["content"], entry) for index, entry in entries.items())
  except (AttributeError, KeyError, TypeError, ValueError):
    raise errors.UserError(f"{origin}: added_tokens_decoder is not a table of tokens") from None
  for index, content, entry in ordered:
    if content not in known_tokens:
      flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
      token = tokenizers.AddedToken(
        content, **{flag: entry[flag] for flag in flags if flag in entry}
      )
      backend.add_tokens([token])
    if backend.token_to_id(content) != index:
      raise errors.UserError(
        f"{origin}: gives {content!r} the id {index}, {PIPELINE} gives it "
        f"{backend.token_to_id(content)}"
      )


def _template(folder: pathlib.Path, config: dict[str, Any]) -> str | None:
  path = folder / TEMPLATE
  if path.is_file():
    return path.read_text(encoding="utf-8")
  template = config.get("chat_template")
  if isinstance(template, list):  # several named templates
    template = next((t.get("template") for t in template if t.get("name") == "default"), None)
  return template


def _content(value: Any) -> str | None:
  """The text of a special token: a string, or a JSON object with the key `content`."""
  return value.get("content") if isinstance(value, dict) else value


def _optional_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise errors.UserError(f"{path}: is not JSON: {_first_line(error)}") from None
  if not isinstance(value, dict):
    raise errors.UserError(f"{path}: contains a {type(value).__name__}, not a JSON object")
  return value


def _clean(text: str) -> str:
  return text.encode("utf-8", "replace").decode() if not text.isascii() else text


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
