"""Step (2) of Queryable LoRA: the running summary of the blocks before, carried by the scan.

Three kinds, each a triple of pure functions over a state that the scan over blocks carries:
`attention` keeps the states of all blocks [.., N, R] and attends over them (Block Attention
Residuals, arXiv 2603.15031); `recurrent` keeps one gated state [.., R], O(1) in depth; `none`
keeps nothing. Letters as in `qlora_jax/typing.py`.
"""

import jax
from jax import numpy as jnp

from qlora_jax.adapters import functional
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array, Float, Int, typed

KINDS = ("attention", "recurrent", "none")


def initial(kind: str, batch: tuple[int, ...], num_blocks: int, rank: int, dtype=jnp.float32):
  """The state before the first block: zeros [*batch, N, R], [*batch, R] or [*batch, 0]."""
  shape = {"attention": (num_blocks, rank), "recurrent": (rank,), "none": (0,)}[kind]
  if kind == "attention":
    return jnp.zeros((num_blocks, *batch, rank), dtype)
  return jnp.zeros((*batch, *shape), dtype)


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
    return depth_attention(carry, pseudo_query, index)
  return carry if kind == "recurrent" else None


def write(kind: str, carry: Array, state: Array, index: Array | int, gate: Array | None) -> Array:
  """The carry after block `index` left `state` [*batch, R] behind."""
  if kind == "attention":
    carry = jax.lax.dynamic_update_index_in_dim(carry, state.astype(carry.dtype), index, 0)
    return sharding.constrain(carry, None, "batch", *[None] * (carry.ndim - 2))
  return gated_update(carry, state, gate) if kind == "recurrent" else carry
