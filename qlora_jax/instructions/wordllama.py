"""WordLlama: the L2-normalised mean of static token vectors; the fast encoder.

The table (32,000 x 256, stored as float16) and the tokeniser come from the wheel `wordllama`.
The result equals the wheel's `WordLlamaInference.embed(texts, norm=True)`: float32 arithmetic, no
special tokens, no truncation, no padding in the mean. One deviation: a text without tokens gives
zeros, where the original divides zero by zero.
"""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import tokenizers
from safetensors import numpy as safetensors_numpy

from qlora_jax.instructions import wheels

DIM = 256
VERSION = 1

_PACKAGE = "wordllama"


def files() -> tuple[pathlib.Path, ...]:
  """Paths of the table and the tokeniser. Raises UserError if the wheel is missing."""
  return (
    wheels.find(_PACKAGE, "weights/l2_supercat_256.safetensors"),
    wheels.find(_PACKAGE, "tokenizers/l2_supercat_tokenizer_config.json"),
  )


def load() -> Callable[[Sequence[str]], np.ndarray]:
  """Reads the table; returns encode: n texts -> float32 [n, 256]."""
  table_path, tokenizer_path = files()
  table = safetensors_numpy.load_file(table_path)["embedding.weight"].astype(np.float32)
  tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_path))
  tokenizer.no_truncation()
  tokenizer.no_padding()

  def encode(texts: Sequence[str]) -> np.ndarray:
    if isinstance(texts, str):
      raise TypeError("encode takes a sequence of texts, not one text")
    embeddings = np.zeros((len(texts), DIM), np.float32)
    for row, encoded in enumerate(tokenizer.encode_batch(list(texts), add_special_tokens=False)):
      if encoded.ids:
        pooled = table[encoded.ids].mean(axis=0)  # [E]
        embeddings[row] = pooled / np.linalg.norm(pooled)
    return embeddings

  return encode
