"""Where each tensor of a Hugging Face checkpoint goes in the decoder's `base` tree.

Tensors are read one at a time, each straight into the shards that need it, and let go of before
the next is read: no device and no host ever holds the model twice.
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

_SHOWN = 8  # names that an error lists
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
# Buffers that old checkpoints carry beside their weights.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One checkpoint tensor, or the third of it that is meant.

  Attributes:
    name: in the checkpoint.
    transposed: whether it is stored [out, in].
    part: 0, 1 or 2 of a joint query-key-value tensor, else None.
  """

  name: str
  transposed: bool = False
  part: int | None = None

  def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The checkpoint's shape for a leaf of `shape`."""
    shape = (*shape[:-1], shape[-1] * (1 if self.part is None else 3))
    return shape[::-1] if self.transposed else shape

  def read(self, source: source_lib.Source, names: Mapping[str, str]) -> np.ndarray:
    value = source.read(names[self.name])
    value = value.T if self.transposed else value
    return value if self.part is None else np.split(value, 3, axis=-1)[self.part]


def layout(config: decoder.DecoderConfig) -> dict[str, tuple[Tensor, ...]]:
  """Path of each leaf of `base` to its tensors: one, or one a block for the leaves of the scan."""
  gpt2 = config.learned_positions > 0
  top = "transformer." if gpt2 else "model."
  found = {
    "embedding": (Tensor(f"{top}{'wte' if gpt2 else 'embed_tokens'}.weight"),),
    "norm/scale": (Tensor(f"{top}{'ln_f' if gpt2 else 'norm'}.weight"),),
  }
  if gpt2:
    found["positions"] = (Tensor("transformer.wpe.weight"),)
    found["norm/bias"] = (Tensor("transformer.ln_f.bias"),)
  if not config.tied:
    found["head"] = (Tensor("lm_head.weight", transposed=True),)
  abstract = nn.unbox(decoder.abstract(config)["base"])
  prefix = top + _GPT2_LAYER if gpt2 else _LLAMA_LAYER
  names = _GPT2 if gpt2 else _LLAMA | (_GEMMA_NORMS if config.post_norms else _LLAMA_NORMS)
  for path in traverse_util.flatten_dict(abstract, sep="/"):
    match = re.fullmatch(r"stack/blocks/layer_(\d+)/(.+)/(\w+)", path)
    if match is None:
      continue
    slot, module, kind = int(match[1]), match[2], match[3]
    part = "qkv".index(module) if gpt2 and module in ("q", "k", "v") else None
    found[path] = tuple(
      Tensor(
        prefix.format(layer=index * config.layers_per_block + slot)
        + f"{names[module]}.{'bias' if kind == 'bias' else 'weight'}",
        transposed=kind == "kernel" and not gpt2,
        part=part,
      )
      for index in range(config.blocks)
    )
  return found


def load_base(
  source: source_lib.Source,
  config: decoder.DecoderConfig,
  shardings: PyTree | None = None,
) -> PyTree:
  """The decoder's `base` variables, in `config.base_dtype`, each created in its shards.

  Args:
    source: an opened checkpoint.
    config: the decoder; see `families.config_from_hf`.
    shardings: a tree like the result; the default device unless given.

  Raises:
    UserError: tensors are missing, unknown or of another shape; all are named.
  """
  wanted = layout(config)
  abstract = traverse_util.flatten_dict(nn.unbox(decoder.abstract(config)["base"]), sep="/")
  names = _names(source, {tensor.name for tensors in wanted.values() for tensor in tensors})
  _check(source, names, wanted, abstract, config)
  placed = traverse_util.flatten_dict(shardings, sep="/") if shardings is not None else {}
  local = jax_sharding.SingleDeviceSharding(jax.devices()[0])
  # The largest tensors first: what reading one takes for a moment then has room that the model
  # fills later.
  order = sorted(
    abstract, key=lambda path: -abstract[path].size // (len(wanted[path]) if path in wanted else 1)
  )
  leaves = {
    path: _leaf(source, names, path, wanted[path], abstract[path], placed.get(path, local))
    for path in order
  }
  return traverse_util.unflatten_dict({path: leaves[path] for path in abstract}, sep="/")


def _names(source: source_lib.Source, wanted: set[str]) -> dict[str, str]:
  """The layout's name of every tensor, to the checkpoint's own.

  Checkpoints of a bare model lack the prefix; those of a multimodal one have a longer one.
  """
  names = {}
  for name in source.names():
    if _IGNORED.search(name):
      continue
    spelled = (name, f"model.{name}", f"transformer.{name}", name.replace("language_model.", "", 1))
    names[next((each for each in spelled if each in wanted), name)] = name
  return names


def _check(
  source: source_lib.Source,
  names: Mapping[str, str],
  wanted: Mapping[str, tuple[Tensor, ...]],
  abstract: Mapping[str, Any],
  config: decoder.DecoderConfig,
) -> None:
  there = set(names)
  needed = {tensor.name for tensors in wanted.values() for tensor in tensors}
  extra = there - needed
  if config.tied:  # some checkpoints keep the tied head
    extra -= {"lm_head.weight"}
  shapes = []
  for path, tensors in wanted.items():
    stacked = path.startswith("stack/")
    shape = abstract[path].shape[1:] if stacked else abstract[path].shape
    for tensor in tensors:
      if tensor.name not in there:
        continue
      stored, expected = source.shape(names[tensor.name]), tensor.stored_shape(shape)
      if stored != expected:
        shapes.append(f"{tensor.name} is {stored}, not {expected}")
  problems = [
    f"{what}: {_listed(names)}"
    for what, names in (
      ("missing tensors", sorted(needed - there)),
      ("unknown tensors", sorted(extra)),
      ("tensors of another shape", shapes),
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
  """One leaf of the tree: each of its tensors is read once, into all shards of this process."""
  stacked = path.startswith("stack/")
  indices = sharding.addressable_devices_indices_map(leaf.shape).values()
  shards = {}  # by their place; devices that hold the same share a buffer, which nobody writes to
  for index in indices:
    spans = _spans(index, leaf.shape)
    if spans not in shards:
      shards[spans] = _aligned(tuple(map(len, spans)), np.dtype(leaf.dtype))
  for block, tensor in enumerate(tensors):
    value = tensor.read(source, names)
    for spans, target in shards.items():
      own = [slice(span.start, span.stop) for span in spans]
      if not stacked:
        target[...] = value[tuple(own)]
      elif block in spans[0]:
        target[block - spans[0].start] = value[tuple(own[1:])]
    del value
    source.release(names[tensor.name])
  return jax.make_array_from_callback(
    leaf.shape, sharding, lambda index: shards[_spans(index, leaf.shape)]
  )


def _spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[range, ...]:
  return tuple(range(*part.indices(size)) for part, size in zip(index, shape, strict=True))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Uninitialised memory that a CPU device can take over without a copy (64-byte aligned)."""
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)
