"""Causal grouped-query attention and its key-value cache, as pure functions.

Masks follow from positions and segments, never from slots. A query sees the keys of the same
segment, at the same position or earlier, inside the layer's window. Padding is a separate segment.
Letters as in `qlora_jax/typing.py`; lower-case letters in einsum strings are the same axes.
"""

from typing import NamedTuple

import jax
from jax import numpy as jnp

from qlora_jax.typing import Array, Bool, Float, Int, typed

FLOOR = -1e30  # finite: exp underflows to exactly 0, and a fully masked row is not NaN
PADDING = 0  # the segment of padding tokens
EMPTY = -1  # the segment of unwritten cache slots


class MaskInfo(NamedTuple):
  """Positions and segments of queries [B, T] and keys [B, C], int32."""

  query_positions: Array
  key_positions: Array
  query_segments: Array
  key_segments: Array


class Cache(NamedTuple):
  """Keys and values of the earlier tokens.

  Attributes:
    keys, values: [L, B, C, G, K].
    positions, segments: int32 [B, C]; unwritten slots have the segment `EMPTY`.
    length: int32 scalar, number of written slots.
  """

  keys: Array
  values: Array
  positions: Array
  segments: Array
  length: Array


@typed
def visible(mask: MaskInfo, window: Int[Array, ""] | int = 0) -> Bool[Array, "B T C"]:
  """Which keys each query sees; `window` is the number of visible keys, 0 means no limit."""
  distance = mask.query_positions[:, :, None] - mask.key_positions[:, None, :]
  seen = (mask.query_segments[:, :, None] == mask.key_segments[:, None, :]) & (distance >= 0)
  if isinstance(window, int):
    return seen & (distance < window) if window else seen
  return seen & ((window == 0) | (distance < window))


@typed
def attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B C G K"],
  value: Float[Array, "B C G K"],
  mask: MaskInfo,
  *,
  scale: float | Float[Array, ""],
  window: Int[Array, ""] | int = 0,
  soft_cap: float = 0.0,
) -> Float[Array, "B T H K"]:
  """softmax(cap(scale q k^T)) v with scores and softmax in float32; cap(x) = c tanh(x / c)."""
  kv_heads = key.shape[2]
  query = query.reshape(*query.shape[:2], kv_heads, -1, query.shape[-1])  # [B, T, G, J, K]
  scores = jnp.einsum("btgjk,bcgk->bgjtc", query, key, preferred_element_type=jnp.float32) * scale
  if soft_cap:
    scores = soft_cap * jnp.tanh(scores / soft_cap)
  scores = jnp.where(visible(mask, window)[:, None, None], scores, FLOOR)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  mixed = jnp.einsum("bgjtc,bcgk->btgjk", weights, value)
  return mixed.reshape(*mixed.shape[:2], -1, mixed.shape[-1])


def empty_cache(
  layers: int, batch: int, length: int, groups: int, head_dim: int, dtype: jnp.dtype
) -> Cache:
  """A cache of `length` unwritten slots per row; `groups` counts the key/value heads."""
  shape = (layers, batch, length, groups, head_dim)
  slots = (batch, length)
  return Cache(
    jnp.zeros(shape, dtype),
    jnp.zeros(shape, dtype),
    jnp.zeros(slots, jnp.int32),
    jnp.full(slots, EMPTY, jnp.int32),
    jnp.zeros((), jnp.int32),
  )


def extend(cache: Cache, positions: Array, segments: Array) -> Cache:
  """The cache with T more slots reserved, for tokens of positions and segments int32 [B, T]."""
  start = (0, cache.length)
  return cache._replace(
    positions=jax.lax.dynamic_update_slice(cache.positions, positions, start),
    segments=jax.lax.dynamic_update_slice(cache.segments, segments, start),
    length=cache.length + positions.shape[1],
  )


def store(
  buffers: tuple[Array, Array], layer: Array | int, start: Array, key: Array, value: Array
) -> tuple[tuple[Array, Array], Array, Array]:
  """Writes the new keys and values of a layer into the cache's buffers, in place.

  Args:
    buffers: keys and values [L, B, C, G, K].
    layer: index of the layer.
    start: first slot to write.
    key, value: [B, T, G, K], converted to the buffers' dtype.

  Returns:
    The two buffers, and this layer's keys and values [B, C, G, K].
  """
  begin = (layer, 0, start, 0, 0)
  buffers = tuple(
    jax.lax.dynamic_update_slice(buffer, new[None].astype(buffer.dtype), begin)
    for buffer, new in zip(buffers, (key, value), strict=True)
  )
  return buffers, *(
    jax.lax.dynamic_index_in_dim(buffer, layer, 0, keepdims=False) for buffer in buffers
  )
