"""FLOPs of a training step in closed form. Letters as in `qlora_jax/typing.py`.

The compiler counts a scan's body once, so that its count is of no use for a scanned model; a test
compares these formulas with it on small unrolled models. A multiply-add is two FLOPs. Matrix
products count, and the vector work of the routing.

Forward, per token and layer: 2 D_in D_out per map, and 2 x 2 C H K for scores and mixture over the
C keys that the token sees. The gradient of the states costs the same again for a frozen map (no
gradient of W), twice for trained weights, twice for attention. Logits are made at answer places
only.
"""

import dataclasses
import math

from qlora_jax.adapters import config as adapter_config
from qlora_jax.models import decoder


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs of one step over the whole batch.

  Attributes:
    base: products with frozen maps; attention: scores and mixtures; head: logits and their loss;
      adapter: the branches; routing: the routers and operators of the blocks.
    recomputed: work of these that the remat choice repeats.
  """

  base: float
  attention: float
  head: float
  adapter: float
  routing: float
  recomputed: float

  @property
  def model(self) -> float:
    """Work that the mathematics needs: the numerator of MFU."""
    return self.base + self.attention + self.head + self.adapter + self.routing

  @property
  def hardware(self) -> float:
    """Work that the device does."""
    return self.model + self.recomputed


def seen_keys(length: int, window: int = 0) -> float:
  """Mean number of keys that a token of one text of `length` sees, itself included."""
  if not window or window >= length:
    return (length + 1) / 2
  return (window * (window + 1) / 2 + (length - window) * window) / length


def step(
  shape: decoder.DecoderConfig,
  adapter: adapter_config.AdapterConfig,
  rows: int,
  length: int,
  answers: int,
) -> Flops:
  """FLOPs of a step on `rows` texts of `length` tokens, `answers` of them places with a loss."""
  tokens = rows * length
  back = 2 if adapter.trains_base else 1  # full fine-tuning needs the gradient of W too
  maps = shape.map_shapes
  base = 2.0 * tokens * shape.layers * sum(math.prod(maps[name]) for name in shape.maps)
  windows = shape.layer_windows or (0,) * shape.layers
  keys = sum(seen_keys(length, window) for window in windows)
  attention = 4.0 * tokens * keys * shape.heads * shape.head_dim
  head = 2.0 * answers * shape.width * shape.vocabulary
  low_rank = tokens * sum(shape.layers * _low_rank(shape, adapter, name) for name in shape.adapted)
  routing = tokens * routing_forward(shape, adapter)
  recomputed = 0.0
  if shape.remat != "none":
    recomputed += attention + routing  # products with batch axes are not kept by `dots` either
  if shape.remat == "full":
    recomputed += base + low_rank
  recomputed += head + attention / 2  # a chunk's logits; scores inside the attention's gradient
  return Flops(
    base * (1 + back), 3 * attention, head * (1 + back), 3 * low_rank, 3 * routing, recomputed
  )


def _low_rank(shape: decoder.DecoderConfig, adapter, name: str) -> float:
  """FLOPs per token of one map's branch, forward."""
  rank = adapter.rank_of(name)
  return float(adapter.record.map_flops(adapter, rank, *shape.map_shapes[name]))


def routing_forward(shape: decoder.DecoderConfig, adapter: adapter_config.AdapterConfig) -> float:
  """FLOPs per token of all blocks' routing, forward."""
  count = adapter.record.routing_flops
  if count is None:
    return 0.0
  return float(count(adapter, shape.blocks, shape.layers_per_block, len(shape.adapted)))
