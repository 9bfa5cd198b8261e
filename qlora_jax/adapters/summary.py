"""Step (2) of Queryable LoRA: the running summary of the blocks before, carried by the scan.

Three kinds, each a triple of pure functions over a state that the scan over blocks carries:
`attention` keeps the states of all blocks and attends over them (Block Attention Residuals,
arXiv 2603.15031); `recurrent` keeps one gated state [.., R], O(1) in depth; `none` keeps nothing.
Letters as in `qlora_jax/typing.py`.

The states of all blocks are kept as [N, .., R, T], the tokens last: a TPU lays a last axis of R = 16
numbers out in 128 places, so that [N, .., T, R] would take eight times its size.
"""

import jax
from jax import numpy as jnp

from qlora_jax.adapters import functional
from qlora_jax.typing import Array, Float, Int, typed

KINDS = ("attention", "recurrent", "none")


def initial(kind: str, batch: tuple[int, ...], num_blocks: int, rank: int, dtype=jnp.float32):
  """The state before the first block: zeros [N, .., R, T], [*batch, R] or [*batch, 0]."""
  if kind == "attention":
    return _tokens_last(jnp.zeros((num_blocks, *batch, rank), dtype), batch)
  return jnp.zeros((*batch, {"recurrent": rank, "none": 0}[kind]), dtype)


def axes(batch_axes: int) -> tuple[str | None, ...]:
  """Logical axes of the states of all blocks: [N, B, .., R, T], [N, R, B] or [N, R]."""
  names: list[str | None] = [None] * (2 + batch_axes)
  if batch_axes:
    names[1 if batch_axes > 1 else -1] = "batch"
  return tuple(names)


def _tokens_last(states: Array, batch: tuple[int, ...]) -> Array:
  """[.., *batch, R] as it is kept, or back; one token without an axis of tokens stays as it is."""
  return jnp.swapaxes(states, -1, -2) if batch else states


@typed
def depth_attention(
  history: Float[Array, "N *batch R"],
  pseudo_query: Float[Array, "R"],
  index: Int[Array, ""] | int,
) -> Float[Array, "*batch R"]:
  """s_b = sum_{j<b} softmax_j(p_b . RMSNorm(h_j)) h_j over the `index` blocks before; s_1 = 0.

  No 1/sqrt(d) in the scores, as in the source. A pseudo-query of zeros gives the uniform mean. It
  is computed in the pseudo-query's dtype, whatever the history is kept in.
  """
  num_blocks, history = history.shape[0], history.astype(pseudo_query.dtype)
  power = jnp.einsum("n...r,n...r->n...", history, history) / history.shape[-1]
  scores = jnp.einsum("n...r,r->n...", history, pseudo_query)
  scores = scores * jax.lax.rsqrt(power + functional.RMS_EPSILON)
  before = (jnp.arange(num_blocks) < index).reshape(num_blocks, *[1] * (history.ndim - 2))
  # A finite floor, not -inf: at the first block every score is masked, and -inf would give NaN.
  attention = jax.nn.softmax(jnp.where(before, scores, -1e30), axis=0) * before
  return jnp.sum(attention[..., None] * history, axis=0)


@typed
def gated_update(
  summary: Float[Array, "*batch R"], state: Float[Array, "*batch R"], gate: Float[Array, "R"]
) -> Float[Array, "*batch R"]:
  """s_{b+1} = sigma(a_b) s_b + (1 - sigma(a_b)) h_b: the `recurrent` summary."""
  keep = jax.nn.sigmoid(gate)
  return keep * summary + (1.0 - keep) * state


def read(kind: str, carry: Array, index: Array | int, pseudo_query: Array | None) -> Array | None:
  """The summary s_b [*batch, R] that block `index` (from 0) sees, or None for `none`."""
  if kind == "attention":
    return depth_attention(_tokens_last(carry, carry.shape[1:-1]), pseudo_query, index)
  return carry if kind == "recurrent" else None


def write(kind: str, carry: Array, state: Array, index: Array | int, gate: Array | None) -> Array:
  """The carry after block `index` left `state` [*batch, R] behind."""
  if kind == "attention":
    state = _tokens_last(state.astype(carry.dtype), state.shape[:-1])
    return jax.lax.dynamic_update_index_in_dim(carry, state, index, 0)
  return gated_update(carry, state, gate) if kind == "recurrent" else carry
