"""The decoder's feed-forward network, gated (SwiGLU, GeGLU) or plain."""

from collections.abc import Callable

import jax
from flax import linen as nn

from qlora_jax.adapters import dense
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "relu": jax.nn.relu,
}


class FeedForward(nn.Module):
  """down(act(gate x) * up x), or down(act(up x)) when not gated.

  Attributes:
    make_map: builds one adapted map by its name.
    activation: a key of `ACTIVATIONS`.
    gated: whether the network has a gate.
  """

  make_map: Callable[[str], nn.Module]
  activation: str
  gated: bool

  def setup(self):
    self.gate = self.make_map("gate") if self.gated else None
    self.up = self.make_map("up")
    self.down = self.make_map("down")

  def __call__(self, x: Array, routing, shared) -> tuple[Array, list]:
    """Maps x [*batch, D] to (y [*batch, D], one routing or None per map)."""
    act = ACTIVATIONS[self.activation]
    if self.gated:
      low_rank = dense.project(x, (self.gate, self.up))
      gate, gate_routing = self.gate(x, routing, shared, low_rank.get("gate"))
      inner, up_routing = self.up(x, routing, shared, low_rank.get("up"))
      inner, map_routings = act(gate) * inner, [gate_routing, up_routing]
    else:
      inner, up_routing = self.up(x, routing, shared)
      inner, map_routings = act(inner), [up_routing]
    inner = sharding.constrain(inner, "batch", *[None] * (inner.ndim - 2), "mlp")
    y, down_routing = self.down(inner, routing, shared)
    return y, [*map_routings, down_routing]
