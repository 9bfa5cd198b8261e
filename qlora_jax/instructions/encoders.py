"""One interface over the frozen sentence encoders.

An encoder's module has `DIM`, `VERSION` (raised when its code gives other numbers for the same
files), `files()` and `load()`. A new encoder is a new module and one line in `_MODULES`.
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
    fingerprint: stable string that changes with the weights, the tokeniser or the code.
    dim: width of an embedding.
    encode: texts -> float32 [n, dim], rows of L2 norm 1. (WordLlama gives a row of zeros for a
      text without a token, such as the empty one.)
  """

  name: str
  fingerprint: str
  dim: int
  encode: Callable[[Sequence[str]], np.ndarray]


def create(name: str) -> Encoder:
  """Loads an encoder.

  Raises:
    UserError: unknown name, or its wheel is not installed.
  """
  module = _module(name)
  return Encoder(name, fingerprint(name), module.DIM, module.load())


def dim(name: str) -> int:
  """Width of the named encoder's embeddings, without loading it. Raises as `create`."""
  return _module(name).DIM


def fingerprint(name: str) -> str:
  """Fingerprint of the named encoder, without loading it. Raises as `create`."""
  module = _module(name)
  return f"{name}-v{module.VERSION}-{wheels.digest(module.files())}"


def _module(name: str) -> types.ModuleType:
  if name not in _MODULES:
    raise errors.UserError(f"instruction encoder: unknown {name!r}; known are {', '.join(NAMES)}")
  return _MODULES[name]
