"""Maps the tensors of a Hugging Face checkpoint to the decoder's `base` tree.

Tensors are read one at a time, directly into the shards that need them. Each is released before the
next is read, so that no device and no host holds the model twice.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import sharding as jax_sharding

from qlora_jax import errors
from qlora_jax.models import decoder
from qlora_jax.typing import PyTree
from qlora_jax.weights import source as source_lib

_SHOWN = 8  # maximum number of names in an error message
_LLAMA_LAYER = "model.layers.{layer}."
_LLAMA = {
  "q": "self_attn.q_proj",
  "k": "self_attn.k_proj",
  "v": "self_attn.v_proj",
  "o": "self_attn.o_proj",
  "mlp/gate": "mlp.gate_proj",
  "mlp/up": "mlp.up_proj",
  "mlp/down": "mlp.down_proj",
  "q_norm": "self_attn.q_norm",
  "k_norm": "self_attn.k_norm",
  "attention_norm": "input_layernorm",
}
_LLAMA_NORMS = {"feed_forward_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
  "attention_post_norm": "post_attention_layernorm",
  "feed_forward_norm": "pre_feedforward_layernorm",
  "feed_forward_post_norm": "post_feedforward_layernorm",
}
_GPT2_LAYER = "h.{layer}."
_GPT2 = {
  "q": "attn.c_attn",
  "k": "attn.c_attn",
  "v": "attn.c_attn",
  "o": "attn.c_proj",
  "mlp/up": "mlp.c_fc",
  "mlp/down": "mlp.c_proj",
  "attention_norm": "ln_1",
  "feed_forward_norm": "ln_2",
}
# Buffers in old checkpoints that are not weights.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One checkpoint tensor, or one third of a joint query-key-value tensor.

  Attributes:
    name: name in the checkpoint.
    transposed: whether the checkpoint stores it as [out, in].
    part: 0, 1 or 2 for query, key or value of a joint tensor, else None.
  """

  name: str
  transposed: bool = False
  part: int | None = None

  def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the checkpoint of a leaf with shape `shape`."""
    shape = (*shape[:-1], shape[-1] * (1 if self.part is None else 3))
    return shape[::-1] if self.transposed else shape

  def read(self, source: source_lib.Source, names: Mapping[str, str]) -> np.ndarray:
    value = source.read(names[self.name])
    value = value.T if self.transposed else value
    return value if self.part is None else np.split(value, 3, axis=-1)[self.part]


def layout(config: decoder.DecoderConfig) -> dict[str, tuple[Tensor, ...]]:
  """Tensors by path of each leaf of `base`: one, or one per block for scanned leaves."""
  gpt2 = config.learned_positions > 0
  top = "transformer." if gpt2 else "model."
  tensors_by_path = {
    "embedding": (Tensor(f"{top}{'wte' if gpt2 else 'embed_tokens'}.weight"),),
    "norm/scale": (Tensor(f"{top}{'ln_f' if gpt2 else 'norm'}.weight"),),
  }
  if gpt2:
    tensors_by_path["positions"] = (Tensor("transformer.wpe.weight"),)
    tensors_by_path["norm/bias"] = (Tensor("transformer.ln_f.bias"),)
  if not config.tied:
    tensors_by_path["head"] = (Tensor("lm_head.weight", transposed=True),)
  abstract = nn.unbox(decoder.abstract(config)["base"])
  prefix = top + _GPT2_LAYER if gpt2 else _LLAMA_LAYER
  names = _GPT2 if gpt2 else _LLAMA | (_GEMMA_NORMS if config.post_norms else _LLAMA_NORMS)
  for path in traverse_util.flatten_dict(abstract, sep="/"):
    match = re.fullmatch(r"stack/blocks/layer_(\d+)/(.+)/(\w+)", path)
    if match is None:
      continue
    slot, module, kind = int(match[1]), match[2], match[3]
    part = "qkv".index(module) if gpt2 and module in ("q", "k", "v") else None
    tensors_by_path[path] = tuple(
      Tensor(
        prefix.format(layer=index * config.layers_per_block + slot)
        + f"{names[module]}.{'bias' if kind == 'bias' else 'weight'}",
        transposed=kind == "kernel" and not gpt2,
        part=part,
      )
      for index in range(config.blocks)
    )
  return tensors_by_path


def load_base(
  source: source_lib.Source,
  config: decoder.DecoderConfig,
  shardings: PyTree | None = None,
) -> PyTree:
  """Loads the decoder's `base` variables, in `config.base_dtype`, directly into their shards.

  Args:
    source: an opened checkpoint.
    config: the decoder; see `families.config_from_hf`.
    shardings: a tree of shardings with the structure of the result; None for the default device.

  Raises:
    UserError: tensors are missing, unknown or of another shape; the message names them.
  """
  tensors_by_path = layout(config)
  abstract = traverse_util.flatten_dict(nn.unbox(decoder.abstract(config)["base"]), sep="/")
  names = _names(
    source, {tensor.name for tensors in tensors_by_path.values() for tensor in tensors}
  )
  _check(source, names, tensors_by_path, abstract, config)
  flat_shardings = traverse_util.flatten_dict(shardings, sep="/") if shardings is not None else {}
  default_sharding = jax_sharding.SingleDeviceSharding(jax.devices()[0])
  # The largest tensors first: reading a tensor needs temporary memory, and most memory is free at
  # the start.
  largest_first = sorted(
    abstract,
    key=lambda path: (
      -abstract[path].size // (len(tensors_by_path[path]) if path in tensors_by_path else 1)
    ),
  )
  leaves = {
    path: _leaf(
      source,
      names,
      path,
      tensors_by_path[path],
      abstract[path],
      flat_shardings.get(path, default_sharding),
    )
    for path in largest_first
  }
  return traverse_util.unflatten_dict({path: leaves[path] for path in abstract}, sep="/")


def _names(source: source_lib.Source, wanted: set[str]) -> dict[str, str]:
  """Checkpoint name by layout name, for every tensor of the checkpoint.

  Checkpoints of a bare model have no prefix; checkpoints of a multimodal model have a longer one.
  """
  names = {}
  for name in source.names():
    if _IGNORED.search(name):
      continue
    candidates = (
      name,
      f"model.{name}",
      f"transformer.{name}",
      name.replace("language_model.", "", 1),
    )
    names[next((candidate for candidate in candidates if candidate in wanted), name)] = name
  return names


def _check(
  source: source_lib.Source,
  names: Mapping[str, str],
  tensors_by_path: Mapping[str, tuple[Tensor, ...]],
  abstract: Mapping[str, Any],
  config: decoder.DecoderConfig,
) -> None:
  available = set(names)
  needed = {tensor.name for tensors in tensors_by_path.values() for tensor in tensors}
  unknown = available - needed
  if config.tied:  # some checkpoints contain the tied head
    unknown -= {"lm_head.weight"}
  wrong_shapes = []
  for path, tensors in tensors_by_path.items():
    stacked = path.startswith("stack/")
    shape = abstract[path].shape[1:] if stacked else abstract[path].shape
    for tensor in tensors:
      if tensor.name not in available:
        continue
      stored, expected = source.shape(names[tensor.name]), tensor.stored_shape(shape)
      if stored != expected:
        wrong_shapes.append(f"{tensor.name} is {stored}, not {expected}")
  problems = [
    f"{problem}: {_listed(names)}"
    for problem, names in (
      ("missing tensors", sorted(needed - available)),
      ("unknown tensors", sorted(unknown)),
      ("tensors of another shape", wrong_shapes),
    )
    if names
  ]
  if problems:
    raise errors.UserError(f"weights {source.name}: {'; '.join(problems)}")


def _listed(names: list[str]) -> str:
  more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  return ", ".join(names[:_SHOWN]) + more


def _leaf(
  source: source_lib.Source,
  names: Mapping[str, str],
  path: str,
  tensors: tuple[Tensor, ...],
  leaf: jax.ShapeDtypeStruct,
  sharding: jax_sharding.Sharding,
) -> jax.Array:
  """Loads one leaf: reads each of its tensors once, into all shards of this process."""
  stacked = path.startswith("stack/")
  indices = sharding.addressable_devices_indices_map(leaf.shape).values()
  # Buffers by index range. Devices with the same range share a buffer, which is never modified.
  shards = {}
  for index in indices:
    spans = _spans(index, leaf.shape)
    if spans not in shards:
      shards[spans] = _aligned(tuple(map(len, spans)), np.dtype(leaf.dtype))
  for block, tensor in enumerate(tensors):
    value = tensor.read(source, names)
    for spans, target in shards.items():
      ranges = [slice(span.start, span.stop) for span in spans]
      if not stacked:
        target[...] = value[tuple(ranges)]
      elif block in spans[0]:
        target[block - spans[0].start] = value[tuple(ranges[1:])]
    del value
    source.release(names[tensor.name])
  return jax.make_array_from_callback(
    leaf.shape, sharding, lambda index: shards[_spans(index, leaf.shape)]
  )


def _spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[range, ...]:
  return tuple(range(*part.indices(size)) for part, size in zip(index, shape, strict=True))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Uninitialised memory, 64-byte aligned, so that a CPU device can use it without a copy."""
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)
