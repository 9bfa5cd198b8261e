"""The normalisations of the decoder families; scales and biases are frozen (`base`)."""

import jax
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.typing import Array

KINDS = ("rms", "rms_offset", "layer")


class Norm(nn.Module):
  """Normalises the last axis in float32 and returns x's dtype.

  Attributes:
    kind: 'rms': x w / rms(x); 'rms_offset': x (1 + w) / rms(x) (Gemma); 'layer': LayerNorm with
      scale and bias (GPT-2).
    width: size of the last axis.
    epsilon: added to the mean square or the variance.
    base_dtype: dtype of the stored scale and bias.
    axis: logical axis name of the scale.
  """

  kind: str
  width: int
  epsilon: float
  base_dtype: str = "float32"
  axis: str = "embed"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dtype = jnp.dtype(self.base_dtype)
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,))
    ones = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
    init = zeros if self.kind == "rms_offset" else ones
    stored = self.variable("base", "scale", lambda: init(None, (self.width,), dtype)).value
    scale = stored.astype(jnp.float32)
    wide = x.astype(jnp.float32)
    if self.kind == "layer":
      bias = self.variable("base", "bias", lambda: zeros(None, (self.width,), dtype)).value
      wide = wide - jnp.mean(wide, -1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.epsilon)
    wide = wide * (scale + 1.0 if self.kind == "rms_offset" else scale)
    if self.kind == "layer":
      wide = wide + bias.astype(jnp.float32)
    return wide.astype(x.dtype)
