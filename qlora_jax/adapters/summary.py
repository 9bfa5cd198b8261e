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
  is computed in the pseudo-query's dtype, for any dtype of the history.
  """
  history = history.astype(pseudo_query.dtype)
  attention = jax.nn.softmax(_scores(history, pseudo_query, index), axis=0)
  # At the first block every score is masked: the softmax is uniform over nothing.
  return jnp.sum((attention * _before(history, index))[..., None] * history, axis=0)


@typed
def depth_log_sum(
  history: Float[Array, "N *batch R"],
  pseudo_query: Float[Array, "R"],
  index: Int[Array, ""] | int,
) -> Float[Array, "*batch"]:
  """log of the softmax's denominator in `depth_attention`."""
  history = history.astype(pseudo_query.dtype)
  return jax.nn.logsumexp(_scores(history, pseudo_query, index), axis=0)


@typed
def depth_gradient(
  state: Float[Array, "*batch R"],
  index: Int[Array, ""] | int,
  pseudo_queries: Float[Array, "N R"],
  grads: Float[Array, "N *batch R"],
  log_sums: Float[Array, "N *batch"],
  dots: Float[Array, "N *batch"],
) -> Float[Array, "*batch R"]:
  """Gradient in h_b, the state that block `index` left behind, from the summaries after it.

  Args:
    state: h_b; index: b.
    pseudo_queries: p_j of every block.
    grads: in s_j, which are read at the blocks j > b only.
    log_sums: `depth_log_sum` of every block j > b; dots: s_j . gradient in s_j.
  """
  state, grads = (array.astype(pseudo_queries.dtype) for array in (state, grads))
  after = (jnp.arange(len(grads)) > index).reshape(-1, *[1] * (log_sums.ndim - 1))

  def scores(state):
    # As exact as `_scores`, which a TPU computes without its matrix unit: `log_sums` are of those.
    products = jnp.einsum("...r,nr->n...", state, pseudo_queries, precision="highest")
    power = jnp.mean(jnp.square(state), axis=-1)
    return products * jax.lax.rsqrt(power + functional.RMS_EPSILON)

  state_scores, pull = jax.vjp(scores, state)
  attention = jnp.where(after, jnp.exp(jnp.where(after, state_scores - log_sums, 0.0)), 0.0)
  (through,) = pull(attention * (jnp.einsum("n...r,...r->n...", grads, state) - dots))
  return jnp.sum(attention[..., None] * grads, axis=0) + through


def _before(history: Array, index: Array | int) -> Array:
  """Which of the blocks come before block `index`, to multiply [N, *batch]."""
  return (jnp.arange(len(history)) < index).reshape(-1, *[1] * (history.ndim - 2))


def _scores(history: Array, pseudo_query: Array, index: Array | int) -> Array:
  """p_b . RMSNorm(h_j) [N, *batch] at the blocks before `index`."""
  power = jnp.einsum("n...r,n...r->n...", history, history) / history.shape[-1]
  scores = jnp.einsum("n...r,r->n...", history, pseudo_query)
  scores = scores * jax.lax.rsqrt(power + functional.RMS_EPSILON)
  # A finite floor, not -inf: at the first block every score is masked, and -inf would give NaN.
  return jnp.where(_before(history, index), scores, -1e30)


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
