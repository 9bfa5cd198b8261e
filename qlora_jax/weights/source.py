"""What every source of pretrained weights offers."""

import abc
import functools
import hashlib
import mmap
from typing import Any

import numpy as np

from qlora_jax.weights import tokenizer as tokenizer_lib

_SAMPLE = 4096


class Source(abc.ABC):
  """Weights, config and tokenizer of one pretrained model.

  Attributes:
    name: how the user named it.
    config: the model's config as Hugging Face writes it.
  """

  name: str
  config: dict[str, Any]

  @abc.abstractmethod
  def names(self) -> list[str]:
    """Sorted Hugging Face names of all tensors."""

  @abc.abstractmethod
  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of a tensor, without reading it. Raises UserError for a name that is not there."""

  @abc.abstractmethod
  def read(self, name: str) -> np.ndarray:
    """One tensor in its stored type (bfloat16 included); quantised ones as float32.

    The array may be a read-only view of the file.

    Raises:
      UserError: there is no such tensor.
    """

  @abc.abstractmethod
  def stored(self, name: str) -> tuple[str, np.ndarray]:
    """Storage type of a tensor, and its bytes as they lie in the file: uint8 [n]."""

  def release(self, name: str) -> None:
    """Lets go of a tensor's resident pages of the file; arrays of it stay valid, and are read anew.

    The operating system would take them back when it needs memory; until then they count as ours.
    """
    stored = self.stored(name)[1]
    mapped = stored
    while isinstance(mapped, np.ndarray):
      mapped = mapped.base
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and stored.size:
      first = stored.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
      start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE  # pages shared with neighbours stay
      length = (first + stored.size) // mmap.PAGESIZE * mmap.PAGESIZE - start
      if length > 0:
        mapped.madvise(mmap.MADV_DONTNEED, start, length)

  @abc.abstractmethod
  def tokenizer(self) -> "tokenizer_lib.Tokenizer":
    """The model's own tokenizer. Raises UserError when it is missing or unknown."""

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 over sorted names, shapes, storage types and the two ends of every tensor.

    The ends are 4 KiB of stored bytes each, so that a large model is told from another without
    being read whole; a change in the middle of a large tensor alone is not seen.
    """
    digest = hashlib.sha256()
    for name in self.names():
      kind, stored = self.stored(name)
      digest.update(f"{name}\0{list(self.shape(name))}\0{kind}\0{stored.size}\0".encode())
      digest.update(stored[:_SAMPLE].tobytes())
      digest.update(stored[-_SAMPLE:].tobytes())
    return digest.hexdigest()
