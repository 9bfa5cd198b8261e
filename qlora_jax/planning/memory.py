"""What a chip must hold: parameters exactly, from their shards; activations by an estimate.

The compiler decides (`compile.py`); the estimate finds the jobs worth compiling.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np
from flax import linen as nn

from qlora_jax.adapters import contraction
from qlora_jax.models import decoder
from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.parallel import sharding
from qlora_jax.workloads import language_step

FLOAT32 = 4
RESERVED = 0.03  # share of a chip's memory that the runtime and fragments take


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes per chip.

  Attributes:
    base: frozen weights; adapter: trained ones; optimizer: its state; batch: the step's inputs.
    activations: states that the forward pass keeps for the gradient.
    temporaries: everything else at the peak: gathered weights, one block's states, gradients.
  """

  base: int
  adapter: int
  optimizer: int
  batch: int
  activations: int
  temporaries: int

  @property
  def total(self) -> int:
    return sum(dataclasses.asdict(self).values())


def shard_bytes(boxed, sizes: Mapping[str, int], rules: mesh_lib.Rules) -> int:
  """Bytes per chip of a tree of shapes boxed with logical axes, split as training splits it."""
  total = 0
  for leaf in jax.tree.leaves(boxed, is_leaf=_is_box):
    value = leaf.value if _is_box(leaf) else leaf
    shards = 1
    if _is_box(leaf) and len(set(leaf.names) - {"blocks"}) >= 2:
      for axes in sharding.spec(value.shape, leaf.names, dict(sizes), rules):
        shards *= math.prod(sizes[axis] for axis in mesh_lib.axes_of(axes))
    total += math.prod(value.shape) * np.dtype(value.dtype).itemsize // shards
  return total


def _is_box(leaf) -> bool:
  return isinstance(leaf, nn.LogicallyPartitioned)


def estimate(
  model: decoder.Decoder,
  sizes: Mapping[str, int],
  rules: mesh_lib.Rules,
  rows: int,
  length: int,
  answers: int,
  micro_batches: int = 1,
  splash: bool = True,
) -> Memory:
  """The memory of a step; see `Memory`.

  Args:
    model: with its adapter.
    sizes: of the mesh's axes.
    rules: of the mesh.
    rows, length, answers: of the whole batch; answers are places with a loss.
    micro_batches: parts of the batch, run one after another.
    splash: whether attention never stores its scores.
  """
  shape, adapter = model.config, model.adapter
  boxed = decoder.abstract(shape, adapter)
  base = shard_bytes(boxed["base"], sizes, rules)
  trained = shard_bytes(boxed.get("params", {}), sizes, rules)
  base += shard_bytes(boxed.get("frozen", {}), sizes, rules)
  if adapter.trains_base:
    trained += base
    base = 0
  shards = math.prod(sizes[axis] for axis in mesh_lib.DATA_AXES)
  tensor, fsdp = sizes["tensor"], sizes["fsdp"]
  tokens = rows * length / shards / micro_batches
  width = np.dtype(shape.dtype).itemsize
  activations = tokens * shape.width * width * shape.blocks  # the input of every block
  layer = layer_bytes(shape, adapter, tokens, length, tensor, splash)
  inside = layer * shape.layers_per_block
  if shape.remat == "none":
    activations, inside = activations + layer * shape.layers, layer
  elif shape.remat == "dots":
    products = sum(_local(shape, name, tensor) for name in shape.maps) * tokens * width
    activations += products * shape.layers
  routed = routing_bytes(shape, adapter, tokens)
  activations += routed["kept"]
  gathered = 0
  if fsdp > 1:  # one layer's gathered weights, and the next layer's in transfer
    maps = sum(math.prod(widths) for widths in shape.map_shapes.values())
    gathered = 2 * maps * np.dtype(shape.base_dtype).itemsize / tensor
  vocabulary = shape.vocabulary / tensor if shape.vocabulary % tensor == 0 else shape.vocabulary
  head = vocabulary * shape.width * width * 2
  chunk = 3 * language_step.CHUNK * vocabulary * FLOAT32
  places = 3 * answers / shards / micro_batches * shape.width * width
  gradients = trained * (1 if micro_batches == 1 else 2)
  hidden = 4 * tokens * shape.width * width
  batch = rows * length / shards * (4 * 4 + FLOAT32 * adapter.instruction_dim)
  batch += answers / shards * 12
  return Memory(
    int(base),
    int(trained),
    int(2 * trained),
    int(batch),
    int(activations),
    int(inside + routed["temporary"] + gathered + head + chunk + places + gradients + hidden),
  )


def _local(shape, name: str, tensor: int) -> float:
  """Width of a map's result on one chip: split over `tensor` if its heads or units are."""
  outputs = shape.map_shapes[name][1]
  if name in ("o", "down") or outputs % tensor:
    return outputs
  return outputs / tensor


def layer_bytes(shape, adapter, tokens: float, length: int, tensor: int, splash: bool) -> float:
  """Bytes of the states that one layer holds during its backward pass."""
  width = np.dtype(shape.dtype).itemsize
  units = sum(_local(shape, name, tensor) for name in shape.maps)
  units += 2 * shape.width + (_local(shape, "up", tensor) if shape.gated else 0)  # norms, product
  states = tokens * units * width
  # Sums of a map and its branch are float32 before they are rounded.
  states += tokens * FLOAT32 * (shape.width + _local(shape, "up", tensor))
  states += tokens * FLOAT32 * padded(adapter.rank) * len(shape.adapted)
  if not splash:
    heads = shape.heads / tensor if shape.heads % tensor == 0 else shape.heads
    states += 2 * tokens * length * heads * FLOAT32
  return states


def padded(size: int) -> int:
  """A last axis takes whole vectors of 128 numbers on a TPU."""
  return -(-size // 128) * 128


def routing_bytes(shape, adapter, tokens: float) -> dict[str, float]:
  """Bytes that Queryable LoRA adds: 'kept' for the gradient, and 'temporary' in one block.

  With recomputed blocks the depth history is kept once (`adapters/depth_scan.py`) and its gradient
  takes no second array; else it is kept once per block. Dense weights exist only in the orders that
  multiply by them.
  """
  if not adapter.routed:
    return {"kept": 0.0, "temporary": 0.0}
  rank, atoms = adapter.rank, adapter.atoms
  state = tokens * rank * FLOAT32
  residuals = history = 0.0
  if adapter.uses_query and adapter.summary == "attention":
    history = shape.blocks * tokens * rank * np.dtype(shape.dtype).itemsize
    if shape.remat == "full":
      residuals, routers = history, len(shape.adapted) if adapter.operator == "map" else 1
      # The first router's gradients replace the history; each router keeps two numbers per block.
      history = (routers - 1) * history + 2 * routers * shape.blocks * tokens * FLOAT32
    else:
      residuals = history * shape.blocks
      history *= 2  # and its gradient
  elif adapter.uses_query and adapter.summary == "recurrent":
    residuals = shape.blocks * state
  gather = contraction.choose(adapter, shape.layers_per_block * len(shape.adapted)) == "gather"
  scores = (2 if gather else 4) * tokens * padded(atoms) * FLOAT32  # and their gradients
  operator = 2 * tokens * rank * rank * FLOAT32
  gathered = 2 * tokens * rank * rank * FLOAT32 if gather else 0.0  # one atom per token at a time
  return {"kept": residuals, "temporary": history + scores + operator + gathered}
