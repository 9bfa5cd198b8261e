"""Causal grouped-query attention and its key-value cache, as pure functions.

Masks are given by positions and segments, never by slots: a query sees the keys of its own
segment at its own position or before, and inside the layer's window. Padding has its own segment.
Letters as in `qlora_jax/typing.py`; small letters in einsum strings are the same axes.
"""

from typing import NamedTuple

import jax
from jax import numpy as jnp

from qlora_jax.typing import Array, Bool, Float, Int, typed

FLOOR = -1e30  # finite: exp underflows to 0 exactly, and a fully masked row is not NaN
PADDING = 0  # the segment of padding tokens
EMPTY = -1  # the segment of cache slots that hold nothing


class MaskInfo(NamedTuple):
  """Positions and segments of queries [B, T] and keys [B, C], int32."""

  query_positions: Array
  key_positions: Array
  query_segments: Array
  key_segments: Array


class Cache(NamedTuple):
  """Keys and values [L, B, C, G, K] of `length` written slots, with their place in the text.

  `positions` and `segments` are [B, C]; unwritten slots have the segment `EMPTY`.
  """

  keys: Array
  values: Array
  positions: Array
  segments: Array
  length: Array


@typed
def visible(mask: MaskInfo, window: Int[Array, ""] | int = 0) -> Bool[Array, "B T C"]:
  """Which keys a query sees; `window` counts the keys of a local layer, 0 means all before."""
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
  groups = key.shape[2]
  query = query.reshape(*query.shape[:2], groups, -1, query.shape[-1])  # [B, T, G, J, K]
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
  """A cache of `length` unwritten slots a row."""
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
  """The cache with T more slots claimed for tokens at positions [B, T] of segments [B, T]."""
  at = (0, cache.length)
  return cache._replace(
    positions=jax.lax.dynamic_update_slice(cache.positions, positions, at),
    segments=jax.lax.dynamic_update_slice(cache.segments, segments, at),
    length=cache.length + positions.shape[1],
  )


def store(
  kept: tuple[Array, Array], layer: Array | int, start: Array, key: Array, value: Array
) -> tuple[tuple[Array, Array], Array, Array]:
  """Writes key and value [B, T, G, K] of a layer at slot `start` of [L, B, C, G, K] in place.

  Returns:
    The two buffers, and the layer's own keys and values [B, C, G, K].
  """
  at = (layer, 0, start, 0, 0)
  kept = tuple(
    jax.lax.dynamic_update_slice(buffer, new[None].astype(buffer.dtype), at)
    for buffer, new in zip(kept, (key, value), strict=True)
  )
  return kept, *(jax.lax.dynamic_index_in_dim(buffer, layer, 0, keepdims=False) for buffer in kept)
