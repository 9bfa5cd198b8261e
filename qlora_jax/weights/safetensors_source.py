"""A Hugging Face folder: config.json, tokenizer files and safetensors, single or sharded.

Opening reads the headers and checks them against the file sizes. Tensors are memory-mapped.
Reference: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np

from qlora_jax import errors
from qlora_jax.weights import source
from qlora_jax.weights import tokenizer as tokenizer_lib

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES: dict[str, Any] = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


class SafetensorsSource(source.Source):
  """See `source.Source`. Opening checks every shard and the byte range of every tensor."""

  def __init__(self, folder: pathlib.Path, name: str):
    self.name = name
    self._folder = folder
    self.config = read_json(folder / "config.json")
    self._tensors = _tensors(folder)  # name -> (file, storage type, shape, first byte, size)
    self._mapped: dict[pathlib.Path, np.memmap] = {}

  def names(self) -> list[str]:
    return sorted(self._tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._entry(name)[2]

  def read(self, name: str) -> np.ndarray:
    kind, stored = self.stored(name)
    return stored.view(_DTYPES[kind]).reshape(self.shape(name))

  def stored(self, name: str) -> tuple[str, np.ndarray]:
    path, kind, _, start, size = self._entry(name)
    if path not in self._mapped:
      try:
        self._mapped[path] = np.memmap(path, np.uint8, "r")
      except (OSError, ValueError) as error:  # it existed at opening
        raise errors.UserError(f"{path}: cannot be read any more: {error}") from None
    if start + size > self._mapped[path].size:
      raise errors.UserError(f"{path}: has become shorter since it was opened")
    return kind, np.asarray(self._mapped[path])[start : start + size]

  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    return tokenizer_lib.from_folder(self._folder)

  def _entry(self, name: str) -> tuple[pathlib.Path, str, tuple[int, ...], int, int]:
    if name not in self._tensors:
      raise errors.UserError(f"{self.name}: the weights have no tensor {name}")
    return self._tensors[name]


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object. Raises UserError for a missing file, invalid JSON or another value."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise errors.UserError(f"{path}: cannot be read: {error.strerror}") from None
  except ValueError as error:
    raise errors.UserError(f"{path}: is not JSON: {error}") from None
  if not isinstance(value, dict):
    raise errors.UserError(f"{path}: contains a {type(value).__name__}, not a JSON object")
  return value


def read_header(path: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
  """Tensors of one safetensors file: name -> (storage type, shape, first byte, size in bytes).

  Raises:
    UserError: the file is missing or truncated, has unknown types, or has a damaged header.
  """
  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
      if 8 + length > size:
        raise errors.UserError(f"{path}: is truncated: its header ends past byte {size}")
      header = json.loads(file.read(length))
  except OSError as error:
    raise errors.UserError(f"{path}: cannot be read: {error.strerror}") from None
  except ValueError as error:
    if isinstance(error, errors.UserError):
      raise
    raise errors.UserError(f"{path}: is not a safetensors file: its header is not JSON") from None
  if not isinstance(header, dict):
    raise errors.UserError(f"{path}: is not a safetensors file: its header is not an object")
  header.pop("__metadata__", None)
  return {name: _placed(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _placed(
  path: pathlib.Path, name: str, entry: Any, start: int, file_size: int
) -> tuple[str, tuple[int, ...], int, int]:
  try:
    kind, shape = entry["dtype"], tuple(int(axis) for axis in entry["shape"])
    first, last = (int(offset) for offset in entry["data_offsets"])
  except (KeyError, TypeError, ValueError):
    raise errors.UserError(f"{path}: damaged header at tensor {name}") from None
  if kind not in _DTYPES:
    raise errors.UserError(
      f"{path}: tensor {name} has the type {kind}; supported: {', '.join(_DTYPES)}"
    )
  expected = math.prod(shape) * np.dtype(_DTYPES[kind]).itemsize
  if first < 0 or min(shape, default=0) < 0 or last - first != expected:
    raise errors.UserError(
      f"{path}: damaged header: tensor {name}, {kind} {list(shape)}, has {last - first} bytes"
    )
  if start + last > file_size:
    raise errors.UserError(
      f"{path}: is truncated: tensor {name} ends at byte {start + last}, the file at {file_size}"
    )
  return kind, shape, start + first, expected


def _tensors(
  folder: pathlib.Path,
) -> dict[str, tuple[pathlib.Path, str, tuple[int, ...], int, int]]:
  if (folder / INDEX).is_file():
    return _sharded(folder)
  path = folder / SINGLE
  if not path.is_file():
    safetensors_paths = sorted(folder.glob("*.safetensors"))
    if len(safetensors_paths) > 1:
      raise errors.UserError(
        f"{folder}: has {len(safetensors_paths)} safetensors files and neither {SINGLE} nor {INDEX}"
      )
    if not safetensors_paths:
      other_path = next(folder.glob("*.bin"), None) or next(folder.glob("*.gguf"), None)
      hint = f"; {other_path.name} cannot be read from a folder" if other_path else ""
      raise errors.UserError(f"{folder}: has no {SINGLE} and no {INDEX}{hint}")
    path = safetensors_paths[0]
  return {name: (path, *entry) for name, entry in read_header(path).items()}


def _sharded(
  folder: pathlib.Path,
) -> dict[str, tuple[pathlib.Path, str, tuple[int, ...], int, int]]:
  index = folder / INDEX
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not all(
    isinstance(shard, str) for shard in weight_map.values()
  ):
    raise errors.UserError(f"{index}: has no weight_map from tensor names to files")
  headers = {}
  for shard in sorted(set(weight_map.values())):
    if pathlib.PurePath(shard).name != shard or shard in (".", ".."):
      raise errors.UserError(f"{index}: the shard {shard!r} lies outside the folder")
    headers[shard] = read_header(folder / shard)
  missing_tensors = [name for name, shard in weight_map.items() if name not in headers[shard]]
  if missing_tensors:
    raise errors.UserError(
      f"{folder / weight_map[missing_tensors[0]]}: lacks {len(missing_tensors)} tensors"
      f" that {INDEX} lists, such as {missing_tensors[0]}"
    )
  return {name: (folder / shard, *headers[shard][name]) for name, shard in weight_map.items()}
