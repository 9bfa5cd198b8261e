"""A GGUF file, read as Hugging Face weights; quantised tensors become float32."""

import functools
import pathlib
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from qlora_jax import errors
from qlora_jax.weights import gguf_header, gguf_layout, gguf_vocabulary, source
from qlora_jax.weights import tokenizer as tokenizer_lib

_KINDS = gguf.GGMLQuantizationType
_PLAIN: dict[gguf.GGMLQuantizationType, Any] = {
  _KINDS.F64: np.float64,
  _KINDS.F32: np.float32,
  _KINDS.F16: np.float16,
  _KINDS.BF16: ml_dtypes.bfloat16,
}
# Types that the package can dequantise; Q8_1 and Q8_K exist only inside llama.cpp's products.
_QUANTISED = (
  *(_KINDS.Q4_0, _KINDS.Q4_1, _KINDS.Q5_0, _KINDS.Q5_1, _KINDS.Q8_0),
  *(_KINDS.Q2_K, _KINDS.Q3_K, _KINDS.Q4_K, _KINDS.Q5_K, _KINDS.Q6_K),
  *(_KINDS.IQ4_NL, _KINDS.IQ4_XS),
)


class GgufSource(source.Source):
  """See `source.Source`. Opening checks the type, name and byte range of every tensor."""

  def __init__(self, path: pathlib.Path, name: str):
    self.name = name
    self._header = gguf_header.read(path)
    self._kind = gguf_layout.architecture(self._header)
    self.config = gguf_layout.config(self._header)
    self._names = gguf_layout.names(self._header)
    for gguf_name in self._names.values():
      kind = self._header.tensors[gguf_name].type
      if kind not in _PLAIN and kind not in _QUANTISED:
        supported = ", ".join(supported_kind.name for supported_kind in (*_PLAIN, *_QUANTISED))
        raise errors.UserError(
          f"{path}: tensor {gguf_name} has the type {kind.name}; supported: {supported}"
        )

  def names(self) -> list[str]:
    return sorted(self._names)

  def shape(self, name: str) -> tuple[int, ...]:
    gguf_name, tensor = self._entry(name)
    return tensor.shape[::-1] if gguf_layout.transposed(self._kind, gguf_name) else tensor.shape

  def read(self, name: str) -> np.ndarray:
    gguf_name, tensor = self._entry(name)
    _, stored = self.stored(name)
    if tensor.type in _PLAIN:
      value = stored.view(_PLAIN[tensor.type]).reshape(tensor.shape)
    else:
      value = gguf.dequantize(stored.reshape(*tensor.shape[:-1], -1), tensor.type)
    return gguf_layout.restore(self._kind, self.config, gguf_name, value)

  def stored(self, name: str) -> tuple[str, np.ndarray]:
    _, tensor = self._entry(name)
    return tensor.type.name, self._bytes[tensor.offset : tensor.offset + tensor.size]

  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    return gguf_vocabulary.tokenizer(self._header)

  @functools.cached_property
  def _bytes(self) -> np.ndarray:
    return np.asarray(np.memmap(self._header.path, np.uint8, "r"))

  def _entry(self, name: str) -> tuple[str, gguf_header.Tensor]:
    if name not in self._names:
      raise errors.UserError(f"{self.name}: the weights have no tensor {name}")
    return self._names[name], self._header.tensors[self._names[name]]
