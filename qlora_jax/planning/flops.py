"""FLOPs of a training step in closed form. Letters as in `qlora_jax/typing.py`.

The compiler's own count takes a scan's body once, so that it is of no use for a scanned model; a
test holds these formulas against it on small unrolled ones. A multiply-add is two FLOPs. Matrix
products count, and of the routing also its vector work, which a product of this size would hide.

Forward, a token of a layer: 2 D_in D_out a map, and 2 x 2 C H K for scores and mixture over the C
keys that it sees. The gradient of the states costs the same again for a frozen map (no gradient of
W), twice for what is trained, twice for attention. A head's logits are made at answer places only.
"""

import dataclasses
import math

from qlora_jax.adapters import config as adapter_config
from qlora_jax.adapters import contraction
from qlora_jax.models import decoder

VECTOR_SOFTMAX = 5  # max, subtract, exp, sum, divide


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs of one step over the whole batch.

  Attributes:
    base: products with frozen maps; attention: scores and mixtures; head: logits and their loss;
      adapter: low-rank products; routing: what Queryable LoRA adds to them.
    recomputed: work that the remat choice repeats, of all of these.
  """

  base: float
  attention: float
  head: float
  adapter: float
  routing: float
  recomputed: float

  @property
  def model(self) -> float:
    """What the mathematics needs: MFU is counted against this."""
    return self.base + self.attention + self.head + self.adapter + self.routing

  @property
  def hardware(self) -> float:
    """What the device does."""
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
  trained = adapter.method == "full"
  back = 2 if trained else 1  # full fine-tuning needs the gradient of W too
  maps = shape.map_shapes
  base = 2.0 * tokens * shape.layers * sum(math.prod(maps[name]) for name in shape.maps)
  windows = shape.layer_windows or (0,) * shape.layers
  keys = sum(seen_keys(length, window) for window in windows)
  attention = 4.0 * tokens * keys * shape.heads * shape.head_dim
  head = 2.0 * answers * shape.width * shape.vocabulary
  low_rank = tokens * sum(shape.layers * _low_rank(shape, adapter, name) for name in shape.adapted)
  routing = tokens * float(routing_forward(shape, adapter)) if adapter.routed else 0.0
  recomputed = 0.0
  if shape.remat != "none":
    recomputed += attention + routing  # products with batch axes are not kept by `dots` either
  if shape.remat == "full":
    recomputed += base + low_rank
  recomputed += head + attention / 2  # a chunk's logits; scores inside the attention's gradient
  return Flops(
    base * (1 + back), 3 * attention, head * (1 + back), 3 * low_rank, 3 * routing, recomputed
  )


def _low_rank(shape, adapter, name: str) -> float:
  """FLOPs a token of a map's own factors, forward."""
  inputs, outputs = shape.map_shapes[name]
  rank, atoms = adapter.rank_of(name), adapter.atoms
  match adapter.method:
    case "none" | "full":
      return 0.0
    case "dora":  # plus the norm of W + A B a step, which is not a token's
      return 2.0 * rank * (inputs + outputs) + outputs
    case "lora_xs":
      return 2.0 * rank * (inputs + outputs + rank)
    case "lily":
      return 2.0 * rank * (inputs + atoms) + 2.0 * atoms * rank * outputs
    case "comol":
      mixed = _contraction(adapter, 1, contraction.choose(adapter, 1))
      return 2.0 * rank * (inputs + outputs + atoms) + mixed
  return 2.0 * rank * (inputs + outputs)


def routing_forward(shape: decoder.DecoderConfig, adapter: adapter_config.AdapterConfig) -> float:
  """FLOPs a token of all blocks' routing, forward: steps (2) to (6) of `docs/method.md`."""
  rank, atoms, query = adapter.rank, adapter.atoms, adapter.query_dim
  routers = len(shape.adapted) if adapter.operator == "map" else 1
  maps = shape.layers_per_block * len(shape.adapted) // routers  # that share one router
  block = VECTOR_SOFTMAX * min(atoms, adapter.kept_atoms) + 4.0 * rank  # w, RMSNorm of z
  if adapter.kept_atoms < atoms:
    block += _selection(atoms, adapter.kept_atoms)
  if adapter.uses_query:
    block += 2.0 * query * atoms  # g
    block += 2.0 * query * rank * (adapter.query_state + (adapter.summary != "none"))
    block += 2.0 * query * adapter.instruction_dim * adapter.instruction_in_query
    if adapter.summary == "attention":  # powers, scores and the weighted sum over N states
      block += (6.0 * rank + VECTOR_SOFTMAX) * shape.blocks
    elif adapter.summary == "recurrent":
      block += 3.0 * rank
  block += _contraction(adapter, maps, contraction.choose(adapter, maps))
  block *= routers
  if adapter.uses_query and adapter.summary != "none":  # the state left behind
    kind = contraction.choose(adapter, maps)
    block += _contraction(adapter, maps + 1, kind) - _contraction(adapter, maps, kind)
  prior = 0.0
  if adapter.uses_prior:
    width = adapter.prior_dim or adapter.instruction_dim
    prior = 2.0 * adapter.instruction_dim * adapter.prior_dim + 2.0 * width * atoms
    prior += VECTOR_SOFTMAX * atoms
  return shape.blocks * block + prior


def _selection(atoms: int, kept: int) -> float:
  """Comparisons of the k largest: all pairs for few atoms, else k passes."""
  return 2.0 * atoms**2 if atoms <= 64 else float(kept * atoms)


def _contraction(adapter, applied: int, kind: str) -> float:
  """(x A) C for `applied` low-rank states of a block, in the order that is chosen."""
  rank, atoms = adapter.rank, adapter.atoms
  if kind == "operator":
    return 2.0 * rank**2 * (atoms + applied)
  if kind == "product":
    return applied * 2.0 * (atoms * rank**2 + atoms * rank)
  return 2.0 * rank**2 * (adapter.kept_atoms + applied)
