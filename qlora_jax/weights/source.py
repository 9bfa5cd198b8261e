"""The interface of every source of pretrained weights."""

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
    name: the name that the user gave.
    config: the model's config in Hugging Face's form.
  """

  name: str
  config: dict[str, Any]

  @abc.abstractmethod
  def names(self) -> list[str]:
    """Sorted Hugging Face names of all tensors."""

  @abc.abstractmethod
  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of a tensor; does not read the tensor. Raises UserError for an unknown name."""

  @abc.abstractmethod
  def read(self, name: str) -> np.ndarray:
    """One tensor in its stored dtype, including bfloat16; a quantised tensor as float32.

    The array can be a read-only view of the file.

    Raises:
      UserError: an unknown name.
    """

  @abc.abstractmethod
  def stored(self, name: str) -> tuple[str, np.ndarray]:
    """Storage type of a tensor, and its bytes in the file: uint8 [n]."""

  def release(self, name: str) -> None:
    """Drops a tensor's file pages from memory; arrays stay valid and load the pages again.

    Without this, the pages count as memory of this process until the operating system needs them.
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
    """The model's tokenizer. Raises UserError if it is missing or not supported."""

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 over sorted names, shapes, storage types and the two ends of every tensor.

    An end is 4 KiB of stored bytes, so that the fingerprint of a large model does not need all its
    bytes. A change only in the middle of a large tensor does not change the fingerprint.
    """
    digest = hashlib.sha256()
    for name in self.names():
      kind, stored = self.stored(name)
      digest.update(f"{name}\0{list(self.shape(name))}\0{kind}\0{stored.size}\0".encode())
      digest.update(stored[:_SAMPLE].tobytes())
      digest.update(stored[-_SAMPLE:].tobytes())
    return digest.hexdigest()
