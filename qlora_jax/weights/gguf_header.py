"""The header of a GGUF file: metadata and the tensor table; every read is bounds-checked.

The `gguf` package also has a reader. This one reads a vocabulary of 49,152 tokens in 0.1 s instead
of 6 s. For a damaged file, it names the file and the byte position. Block sizes and type numbers
come from the package.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

import dataclasses
import math
import pathlib
import struct
from typing import Any

import gguf
import numpy as np

from qlora_jax import errors

_VERSIONS = (2, 3)
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# Value type number -> NumPy type of a fixed-size value.
_SCALARS = {
  0: "<u1",
  1: "<i1",
  2: "<u2",
  3: "<i2",
  4: "<u4",
  5: "<i4",
  6: "<f4",
  7: "?",
  10: "<u8",
  11: "<i8",
  12: "<f8",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Type and position of one tensor.

  Attributes:
    shape: in NumPy order, the slowest axis first (GGUF stores the reverse).
    type: storage type of the numbers.
    offset: position of the first byte in the file.
    size: number of bytes.
  """

  shape: tuple[int, ...]
  type: gguf.GGMLQuantizationType
  offset: int
  size: int


@dataclasses.dataclass(frozen=True)
class Header:
  """Metadata by key (numbers, booleans, strings or lists of them), tensors by GGUF name."""

  path: pathlib.Path
  metadata: dict[str, Any]
  tensors: dict[str, Tensor]

  def get(self, key: str, kind: type, default: Any = None) -> Any:
    """The value of a key, checked to be a `kind`; an integer is accepted as a float.

    Raises:
      UserError: the value has another type, or the key is missing and has no default.
    """
    if key not in self.metadata:
      if default is None:
        raise errors.UserError(f"{self.path}: the metadata have no {key}")
      return default
    value = self.metadata[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
      raise errors.UserError(f"{self.path}: {key} is {str(value)[:40]!r}, not {kind.__name__}")
    return value


def read(path: pathlib.Path) -> Header:
  """Reads the header; reads no tensors.

  Raises:
    UserError: the file is missing, not GGUF, truncated or inconsistent, or has an unknown version
      or byte order.
  """
  cursor = _Cursor(path)
  if bytes(cursor.take(4)) != b"GGUF":
    raise errors.UserError(f"{path}: is not a GGUF file (it does not start with the letters GGUF)")
  version = cursor.unpack("<I")
  if version not in _VERSIONS:
    order = " or its byte order is big-endian" if version & 0xFFFF == 0 else ""
    raise errors.UserError(f"{path}: GGUF version {version} is not 2 or 3{order}")
  n_tensors, n_keys = cursor.unpack("<Q"), cursor.unpack("<Q")
  metadata: dict[str, Any] = {}
  for _ in range(n_keys):
    key = cursor.string()
    if key in metadata:
      raise errors.UserError(f"{path}: damaged header: {key} occurs twice")
    metadata[key] = cursor.value(cursor.unpack("<I"))
  entries = [_entry(cursor) for _ in range(n_tensors)]
  alignment = metadata.get("general.alignment", _ALIGNMENT)
  if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
    raise errors.UserError(f"{path}: damaged header: alignment {alignment} is not a power of two")
  start = -(-cursor.position // alignment) * alignment
  tensors: dict[str, Tensor] = {}
  for name, tensor in entries:
    if name in tensors:
      raise errors.UserError(f"{path}: damaged header: tensor {name} occurs twice")
    tensor = dataclasses.replace(tensor, offset=start + tensor.offset)
    if tensor.offset + tensor.size > cursor.size:
      raise errors.UserError(
        f"{path}: is truncated: tensor {name} ends at byte {tensor.offset + tensor.size}, the "
        f"file at byte {cursor.size}"
      )
    tensors[name] = tensor
  return Header(path, metadata, tensors)


def _entry(cursor: "_Cursor") -> tuple[str, Tensor]:
  name = cursor.string()
  n_axes = cursor.unpack("<I")
  if n_axes > 4:
    raise errors.UserError(f"{cursor.path}: damaged header: tensor {name} has {n_axes} axes")
  shape = tuple(cursor.unpack("<Q") for _ in range(n_axes))[::-1]
  number, offset = cursor.unpack("<I"), cursor.unpack("<Q")
  try:
    kind = gguf.GGMLQuantizationType(number)
  except ValueError:
    raise errors.UserError(
      f"{cursor.path}: tensor {name} has the unknown storage type {number}"
    ) from None
  block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  if not shape or 0 in shape or shape[-1] % block:
    raise errors.UserError(
      f"{cursor.path}: damaged header: tensor {name} of type {kind.name} has shape {list(shape)}"
    )
  return name, Tensor(shape, kind, offset, math.prod(shape) // block * block_bytes)


class _Cursor:
  """A read position in a memory-mapped file; reads past the end raise UserError."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.position = 0
    try:
      self.size = path.stat().st_size
      self.data = memoryview(np.memmap(path, np.uint8, "r")) if self.size else memoryview(b"")
    except OSError as error:
      raise errors.UserError(f"{path}: cannot be read: {error.strerror}") from None

  def take(self, count: int) -> memoryview:
    if count > self.size - self.position:
      raise errors.UserError(
        f"{self.path}: is truncated: its header extends past the end of the file (byte {self.size})"
      )
    self.position += count
    return self.data[self.position - count : self.position]

  def unpack(self, code: str) -> int:
    return struct.unpack(code, self.take(struct.calcsize(code)))[0]

  def string(self) -> str:
    raw = bytes(self.take(self.unpack("<Q")))
    try:
      return raw.decode()
    except UnicodeDecodeError:
      raise errors.UserError(
        f"{self.path}: damaged header: text that is not UTF-8 before byte {self.position}"
      ) from None

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind == _ARRAY:
      item, count = self.unpack("<I"), self.unpack("<Q")
      if item == _STRING:
        return [self.string() for _ in range(count)]
      return self._numbers(item, count).tolist()
    return self._numbers(kind, 1)[0].item()

  def _numbers(self, kind: int, count: int) -> np.ndarray:
    if kind not in _SCALARS:
      raise errors.UserError(
        f"{self.path}: damaged header: value type {kind} before byte {self.position}"
      )
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(self.take(count * dtype.itemsize), dtype)
