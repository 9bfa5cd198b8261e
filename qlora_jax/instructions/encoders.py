"""One interface over the frozen sentence encoders.

An encoder's module has `DIM`, `VERSION`, `files()` and `load()`. `VERSION` increases when the code
gives other numbers for the same files. A new encoder is a new module and one line in `_MODULES`.
"""

import dataclasses
import types
from collections.abc import Callable, Sequence

import numpy as np

from qlora_jax import errors
from qlora_jax.instructions import minilm, wheels, wordllama

_MODULES: dict[str, types.ModuleType] = {"minilm": minilm, "wordllama": wordllama}
NAMES = tuple(_MODULES)


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A frozen map from texts to unit vectors.

  Attributes:
    name: one of `NAMES`.
    fingerprint: stable string that changes with the weights, the tokeniser or `VERSION`.
    dim: width of an embedding.
    encode: n texts -> float32 [n, dim], rows of L2 norm 1. Exception: WordLlama returns a row of
      zeros for a text without tokens, such as the empty text.
  """

  name: str
  fingerprint: str
  dim: int
  encode: Callable[[Sequence[str]], np.ndarray]


def create(name: str) -> Encoder:
  """Loads an encoder.

  Raises:
    UserError: an unknown name, or the wheel is not installed.
  """
  module = _module(name)
  return Encoder(name, fingerprint(name), module.DIM, module.load())


def dim(name: str) -> int:
  """Embedding width of an encoder; does not load it. Raises UserError for an unknown name."""
  return _module(name).DIM


def fingerprint(name: str) -> str:
  """Fingerprint of an encoder; does not load it. Raises the errors of `create`."""
  module = _module(name)
  return f"{name}-v{module.VERSION}-{wheels.digest(module.files())}"


def _module(name: str) -> types.ModuleType:
  if name not in _MODULES:
    raise errors.UserError(f"instruction encoder: unknown {name!r}; known: {', '.join(NAMES)}")
  return _MODULES[name]
