"""A pre-norm residual MLP over N blocks of S layers, for regression.

Layer: x <- x + down(gelu(up(RMSNorm(x)))), with both maps in adapter slots. The scan over blocks
and its routing are `adapters/block.py`. Letters as in `qlora_jax/typing.py`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax import errors
from qlora_jax.adapters import block, dense
from qlora_jax.adapters import config as adapter_config
from qlora_jax.typing import Array, PyTree

MAPS = ("up", "down")
_AXES = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
_SCAN_UNROLL = 8  # a block of this width takes less time than one iteration of a compiled loop


@dataclasses.dataclass(frozen=True)
class MLPConfig:
  """Shape of the backbone.

  Attributes:
    inputs: width of the feature vector.
    width: D.
    hidden: F.
    layers: L; layers_per_block: S, which must divide L.
    unroll: a Python loop over the blocks instead of the scan.

  Raises:
    UserError: a size is below 1, or S does not divide L.
  """

  inputs: int = 16
  width: int = 64
  hidden: int = 64
  layers: int = 8
  layers_per_block: int = 2
  unroll: bool = False

  def __post_init__(self):
    for name in ("inputs", "width", "hidden", "layers", "layers_per_block"):
      if getattr(self, name) < 1:
        raise errors.UserError(f"model.{name}: {getattr(self, name)} is not at least 1")
    if self.layers % self.layers_per_block:
      divisors = [s for s in range(1, self.layers + 1) if self.layers % s == 0]
      raise errors.UserError(
        f"model.layers_per_block: {self.layers_per_block} does not divide model.layers ="
        f" {self.layers}; use one of {', '.join(map(str, divisors))}"
      )

  @property
  def blocks(self) -> int:
    return self.layers // self.layers_per_block

  @property
  def map_shapes(self) -> dict[str, tuple[int, int]]:
    """(D_in, D_out) of both maps."""
    return {"up": (self.width, self.hidden), "down": (self.hidden, self.width)}


class Prediction(NamedTuple):
  """`values` float32 [*batch], and the blocks' routing."""

  values: Array
  routing: block.RoutingRecord


class RMSNorm(nn.Module):
  """Root-mean-square normalisation with a frozen learned scale."""

  width: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
    scale = self.variable("base", "scale", lambda: init(None, (self.width,), jnp.float32))
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * scale.value


class Layer(nn.Module):
  """One residual layer, see `block.BlockStack` for its methods."""

  config: MLPConfig
  adapter: adapter_config.AdapterConfig
  maps: int

  def setup(self):
    cfg = self.config
    self.norm = RMSNorm(cfg.width)
    self.up = dense.AdaptedDense(self.adapter, "up", cfg.width, cfg.hidden, self.maps, _AXES["up"])
    self.down = dense.AdaptedDense(
      self.adapter, "down", cfg.hidden, cfg.width, self.maps, _AXES["down"]
    )

  def anchor_state(self, hidden: Array) -> Array:
    return self.up.low_rank_state(self.norm(hidden))

  def __call__(self, hidden, routing, shared):
    inner, up_routing = self.up(self.norm(hidden), routing, shared)
    update, down_routing = self.down(nn.gelu(inner), routing, shared)
    map_routings = (up_routing, down_routing)
    return hidden + update, tuple(routed for routed in map_routings if routed is not None)


def in_blocks(base: PyTree, layers_per_block: int) -> PyTree:
  """Converts a base with one layer per block to S layers per block; the function is the same.

  Leaves [L, ..] of `layer_0` become leaves [L / S, ..] of `layer_0` to `layer_{S-1}`.
  """
  if layers_per_block == 1:
    return base
  layer = base["stack"]["blocks"]["layer_0"]
  blocks = {
    f"layer_{slot}": jax.tree.map(lambda leaf, slot=slot: leaf[slot::layers_per_block], layer)
    for slot in range(layers_per_block)
  }
  return {**base, "stack": {**base["stack"], "blocks": blocks}}


class MLP(nn.Module):
  """Maps features [*batch, inputs] and an instruction [*batch, E] or None to a `Prediction`."""

  config: MLPConfig
  adapter: adapter_config.AdapterConfig

  @nn.compact
  def __call__(self, features: Array, instruction: Array | None = None) -> Prediction:
    cfg = self.config
    frozen = adapter_config.AdapterConfig(method="none")
    hidden, _ = dense.AdaptedDense(
      frozen, "input", cfg.inputs, cfg.width, 0, ("features", "embed"), name="input"
    )(features, None, {})
    if self.adapter.instruction_in_input:
      # Zeros, so that the adapted network starts as its base for every instruction.
      kernel = self.param(
        "instruction_input",
        nn.with_logical_partitioning(nn.initializers.zeros, ("instruction", "embed")),
        (self.adapter.instruction_dim, cfg.width),
      )
      hidden = hidden + jnp.einsum("...e,ed->...d", instruction, kernel)
    hidden, routing = block.BlockStack(
      self.adapter,
      functools.partial(Layer, cfg, self.adapter),
      cfg.blocks,
      cfg.layers_per_block,
      tuple((name, cfg.map_shapes[name][1], _AXES[name][1]) for name in MAPS),
      cfg.unroll,
      _SCAN_UNROLL,
      name="stack",
    )(hidden, instruction)
    values, _ = dense.AdaptedDense(
      frozen, "output", cfg.width, 1, 0, ("embed", "target"), name="output"
    )(RMSNorm(cfg.width, name="norm")(hidden), None, {})
    return Prediction(values[..., 0], routing)
