"""Rotary position embedding (arXiv 2104.09864) in the half-split layout, and its scalings.

A model has Z kinds of rotation; Gemma 3 has two. Letters as in `qlora_jax/typing.py`.
"""

import dataclasses
import math

import numpy as np
from jax import numpy as jnp

from qlora_jax import errors
from qlora_jax.typing import Array, Float, Int, typed

KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """One kind of rotation.

  Attributes:
    theta: the base of the wavelengths.
    kind: one of `KINDS`: no scaling, positions divided by `factor`, Llama 3's scaling, or YaRN's.
    factor: ratio of the new context to `original_length`.
    original_length: context before the extension, in tokens (llama3, yarn).
    low, high: llama3's low_freq_factor and high_freq_factor; YaRN's beta_slow and beta_fast.
    attention_factor: YaRN's factor on queries and keys; 0 means 1 + 0.1 log(factor).
    truncate: whether YaRN rounds the ends of its range of dimensions to integers.

  Raises:
    UserError: an unknown kind.
  """

  theta: float = 10_000.0
  kind: str = "default"
  factor: float = 1.0
  original_length: int = 8192
  low: float = 1.0
  high: float = 4.0
  attention_factor: float = 0.0
  truncate: bool = True

  def __post_init__(self):
    if self.kind not in KINDS:
      raise errors.UserError(f"model.rope: {self.kind!r} is unknown; use one of {', '.join(KINDS)}")


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
  """Radians per position, float64 [K/2], and the factor on cos and sin (1 except for YaRN)."""
  plain = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
  slow = plain / rope.factor
  if rope.kind == "default":
    return plain, 1.0
  if rope.kind == "linear":
    return slow, 1.0
  if rope.kind == "llama3":
    # Wavelengths above original/low are scaled, below original/high unchanged, between: blended.
    turns = rope.original_length * plain / (2 * math.pi)
    plain_share = np.clip((turns - rope.low) / (rope.high - rope.low), 0.0, 1.0)
    return slow * (1 - plain_share) + plain * plain_share, 1.0

  def dimension(rotations):  # the dimension that turns `rotations` times over the original context
    turns = rope.original_length / (rotations * 2 * math.pi)
    return head_dim * math.log(turns) / (2 * math.log(rope.theta))

  first, last = dimension(rope.high), dimension(rope.low)
  if rope.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, head_dim - 1)
  ramp = np.arange(head_dim // 2) - first
  plain_share = 1.0 - np.clip(ramp / (last - first or 1e-3), 0.0, 1.0)
  scale = rope.attention_factor or (0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0)
  return slow * (1 - plain_share) + plain * plain_share, scale


@typed
def tables(
  ropes: tuple[RopeConfig, ...], head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "Z B T K2"], Float[Array, "Z B T K2"]]:
  """cos and sin of every kind of rotation at the positions, float32."""
  rates_and_scales = [frequencies(rope, head_dim) for rope in ropes]
  rates = jnp.asarray(np.stack([rate for rate, _ in rates_and_scales]), jnp.float32)
  scale = jnp.asarray([scale for _, scale in rates_and_scales], jnp.float32)[:, None, None, None]
  angles = jnp.einsum("bt,zk->zbtk", positions.astype(jnp.float32), rates)
  return jnp.cos(angles) * scale, jnp.sin(angles) * scale


@typed
def rotate(
  x: Float[Array, "B T H K"], cos: Float[Array, "B T K2"], sin: Float[Array, "B T K2"]
) -> Float[Array, "B T H K"]:
  """Rotates the pairs (x_i, x_{i + K/2}) by their angles, in float32; returns x's dtype."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
  return rotated.astype(x.dtype)
