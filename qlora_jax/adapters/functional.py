"""The mathematics of Queryable LoRA as pure functions.

Queryable LoRA: Instruction-Regularized Routing Over Shared Low-Rank Update Atoms
(arXiv 2605.08423). The numbers (1)-(6) are the steps of `docs/method.md`:

  (1) low-rank state     z = RMSNorm(x A*)
  (2) running summary    s_b = sum_{j<b} softmax_j(p_b . RMSNorm(h_j)) h_j   (`summary.py`)
  (3) query              q = z W_z + s W_s + e W_e + c_b
  (4) logits             g_m = q . kappa_m / sqrt(Q) + lambda * log pi_m(e)
  (5) sparse attention   w = softmax over the k largest g
  (6) routed operator    C = sum_m w_m U_m,   y = x W + scaling * (x A) C B

Every function works on any leading axes (`...`): [B] in regression, [B, T] in a decoder. Letters
as in `qlora_jax/typing.py`.
"""

import functools

import jax
import numpy as np
from jax import numpy as jnp

from qlora_jax.typing import Array, Float, Int, typed

RMS_EPSILON = 1e-6


@typed
def rms_norm(x: Float[Array, "*batch R"]) -> Float[Array, "*batch R"]:
  """Divides the last axis by its root mean square; no learned scale."""
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + RMS_EPSILON)


@jax.custom_vjp
def _product(x: Array, factor: Array) -> Array:
  """x [*batch, a] times a thin factor [a, b], summed in the factor's dtype.

  Its gradient in the factor is formed as (narrow)^T (wide). Automatic differentiation would
  transpose the wide matrix for every map, which takes a CPU longer than the product.
  """
  return jnp.einsum("...a,ab->...b", x, factor.astype(x.dtype), preferred_element_type=factor.dtype)


def _product_forward(x: Array, factor: Array) -> tuple[Array, tuple[Array, Array]]:
  return _product(x, factor), (x, factor)


def _product_backward(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
  x, factor = residuals
  batch = tuple(range(x.ndim - 1))
  sums = ((batch, batch), ((), ()))
  grad_x = jnp.einsum("...b,ab->...a", grad, factor).astype(x.dtype)
  if factor.shape[0] <= factor.shape[1]:
    return grad_x, jax.lax.dot_general(x, grad, sums, preferred_element_type=factor.dtype)
  return grad_x, jax.lax.dot_general(grad, x, sums, preferred_element_type=factor.dtype).T


_product.defvjp(_product_forward, _product_backward)


@typed
def project(x: Float[Array, "*batch D"], lora_a: Float[Array, "D R"]) -> Float[Array, "*batch R"]:
  """x A in float32, multiplied in x's dtype: the arrays kept for the gradient stay small."""
  return _product(x, lora_a)


@typed
def low_rank_state(
  x: Float[Array, "*batch D"], lora_a: Float[Array, "D R"]
) -> Float[Array, "*batch R"]:
  """Step (1): z = RMSNorm(x A*), with A* the `lora_a` of the block's anchor map."""
  return rms_norm(project(x, lora_a))


@typed
def query(
  state: Float[Array, "*batch R"],
  summary: Float[Array, "*batch R"] | None,
  instruction: Float[Array, "*#batch E"] | None,
  state_kernel: Float[Array, "R Q"] | None,
  summary_kernel: Float[Array, "R Q"] | None,
  instruction_kernel: Float[Array, "E Q"] | None,
  bias: Float[Array, "Q"] | None,
) -> Float[Array, "*batch Q"]:
  """Step (3): q = z W_z + s W_s + e W_e + c_b; a term whose kernel is None is left out.

  The bias c_b is ours: with it a block can prefer an atom for every input.
  """
  terms = []
  if state_kernel is not None:
    terms.append(jnp.einsum("...r,rq->...q", state, state_kernel))
  if summary_kernel is not None:
    terms.append(jnp.einsum("...r,rq->...q", summary, summary_kernel))
  if instruction_kernel is not None:
    terms.append(jnp.einsum("...e,eq->...q", instruction, instruction_kernel))
  if bias is not None:
    terms.append(jnp.broadcast_to(bias, (*state.shape[:-1], bias.shape[-1])))
  if not terms:
    raise ValueError("a query needs at least one of state, summary, instruction and bias")
  return sum(terms[1:], start=terms[0]) + jnp.zeros((*state.shape[:-1], 1), state.dtype)


@typed
def log_language_prior(
  instruction: Float[Array, "*batch E"],
  projection: Float[Array, "E P"] | None,
  descriptors: Float[Array, "M P"],
  temperature: float,
) -> Float[Array, "*batch M"]:
  """log pi(e) of step (4): pi = softmax(e P . nu_m / tau); without P, nu has width E."""
  if projection is not None:
    instruction = jnp.einsum("...e,ep->...p", instruction, projection)
  scores = jnp.einsum("...p,mp->...m", instruction, descriptors)
  return jax.nn.log_softmax(scores / temperature, axis=-1)


@typed
def router_logits(
  query: Float[Array, "*batch Q"],
  atom_keys: Float[Array, "M Q"],
  log_prior: Float[Array, "*#batch M"] | None = None,
  prior_weight: float = 0.0,
) -> Float[Array, "*batch M"]:
  """Step (4): g_m = q . kappa_m / sqrt(Q) + lambda * log pi_m(e); lambda = 0 ignores the prior."""
  logits = jnp.einsum("...q,mq->...m", query, atom_keys) / jnp.sqrt(1.0 * atom_keys.shape[-1])
  if log_prior is not None and prior_weight != 0.0:
    logits = logits + prior_weight * log_prior
  return logits


@typed
def top_k_mask(logits: Float[Array, "*batch M"], k: int) -> Float[Array, "*batch M"]:
  """1.0 on the k largest logits and 0.0 elsewhere; among ties the lowest index wins.

  The rank of an atom is the number of atoms that beat it, counted by comparing all pairs. For tens
  of atoms this is cheaper than a sort, and exactly k atoms always win.
  """
  num_atoms = logits.shape[-1]
  if num_atoms > 64:  # M^2 comparisons lose to one sort
    _, chosen = jax.lax.top_k(logits, k)
    return jnp.sum(jax.nn.one_hot(chosen, num_atoms, dtype=logits.dtype), axis=-2)
  index = jnp.arange(num_atoms)
  rival, logit = logits[..., None, :], logits[..., :, None]
  beats = (rival > logit) | ((rival == logit) & (index[None, :] < index[:, None]))
  return (jnp.sum(beats, axis=-1) < k).astype(logits.dtype)


@typed
def sparse_weights(
  logits: Float[Array, "*batch M"], k: int, equal: bool = False
) -> Float[Array, "*batch M"]:
  """Step (5): softmax over the k largest logits, zero elsewhere: a convex combination.

  With `equal` the k atoms get 1/k each in the forward pass; the gradient is that of the softmax
  (straight through). This control shows whether the weights matter.
  """
  if k >= logits.shape[-1]:
    mask = jnp.ones_like(logits)
    weights = jax.nn.softmax(logits, axis=-1)
  else:
    mask = jax.lax.stop_gradient(top_k_mask(logits, k))
    weights = jax.nn.softmax(jnp.where(mask > 0, logits, -jnp.inf), axis=-1)
  if equal:
    return weights + jax.lax.stop_gradient(mask / jnp.sum(mask, axis=-1, keepdims=True) - weights)
  return weights


@typed
def sparse_choice(
  logits: Float[Array, "*batch M"], k: int, equal: bool = False
) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
  """Step (5) without the zeros: the weights of the k largest logits, and the atoms' indices.

  `dense_weights` of them is `sparse_weights`. With many atoms it is cheaper: k numbers per token,
  not M.
  """
  largest, chosen = jax.lax.top_k(logits, k)
  # Without the barrier, a slice of `chosen` beside top-k makes XLA sort all M logits: 60 times as
  # long for M = 4096 on a CPU.
  chosen = jax.lax.optimization_barrier(chosen)
  weights = jax.nn.softmax(largest, axis=-1)
  if equal:
    weights = weights + jax.lax.stop_gradient(1.0 / k - weights)
  return weights, chosen


@typed
def dense_weights(
  values: Float[Array, "*batch k"], chosen: Int[Array, "*batch k"], num_atoms: int
) -> Float[Array, "*batch M"]:
  """The weights [*batch, M] of `sparse_choice`, zero where an atom is not chosen."""
  places = jax.nn.one_hot(chosen, num_atoms, dtype=values.dtype)
  return jnp.einsum("...k,...km->...m", values, places)


@typed
def routed_operator(
  weights: Float[Array, "*batch M"], atoms: Float[Array, "M R R2"]
) -> Float[Array, "*batch R R2"]:
  """Step (6): C = sum_m w_m U_m."""
  flat = jnp.einsum("...m,ma->...a", weights, atoms.reshape(atoms.shape[0], -1))
  return flat.reshape(*flat.shape[:-1], *atoms.shape[1:])


@typed
def apply_operator(
  low_rank: Float[Array, "*batch R"], operator: Float[Array, "*#batch R R2"]
) -> Float[Array, "*batch R2"]:
  """(x A) C with one operator per token: a batched [1, R] x [R, R] product.

  XLA's CPU compiler makes a slow loop of many tiny products, above all of their gradient. There the
  same sum uses two constant 0/1 matrices: x A is repeated to width R R2, multiplied by C
  elementwise and summed, all in wide operations.
  """
  shape = jnp.broadcast_shapes(operator.shape[:-2], low_rank.shape[:-1])
  if operator.shape[:-2] != shape:
    return jnp.einsum("...r,...rs->...s", low_rank, operator)
  return jax.lax.platform_dependent(low_rank, operator, cpu=_apply_expanded, default=_apply_batched)


def _apply_batched(low_rank, operator):
  return jnp.einsum("...r,...rs->...s", low_rank, operator)


def _apply_expanded(low_rank, operator):
  rows, columns = operator.shape[-2:]
  repeat = np.repeat(np.eye(rows, dtype=low_rank.dtype), columns, axis=1)  # [R, R R2]
  collect = np.tile(np.eye(columns, dtype=low_rank.dtype), (rows, 1))  # [R R2, R2]
  flat = operator.reshape(*operator.shape[:-2], rows * columns)
  return ((low_rank @ repeat) * flat) @ collect


@typed
def apply_atoms(
  low_rank: Float[Array, "*batch R"],
  weights: Float[Array, "*batch M"],
  atoms: Float[Array, "M R R2"],
) -> Float[Array, "*batch R2"]:
  """(x A) C without building C: one [.., R] x [R, M R] product, then the weighted sum."""
  products = jnp.einsum("...r,mrs->...ms", low_rank, atoms)
  return jnp.einsum("...m,...ms->...s", weights, products)


@typed
def gather_atoms(
  low_rank: Float[Array, "*batch R"],
  weights: Float[Array, "*batch M"],
  atoms: Float[Array, "M R R2"],
  k: int,
) -> Float[Array, "*batch R2"]:
  """(x A) C from the k atoms with weight: k R^2 work per token for any M."""
  values, chosen = jax.lax.top_k(weights, k)  # [.., k]
  products = jnp.einsum("...r,...krs->...ks", low_rank, atoms[chosen])
  return jnp.einsum("...k,...ks->...s", values, products)


@typed
def gathered_operator(
  values: Float[Array, "*batch k"], chosen: Int[Array, "*batch k"], atoms: Float[Array, "M R R2"]
) -> Float[Array, "*batch R R2"]:
  """Step (6) from the k atoms of `sparse_choice`: C = sum_m w_m U_m over them.

  Up to 16 atoms are added one after another, and gathered again for the gradient, so that
  [*batch, k, R, R] never exists.
  """
  if chosen.shape[-1] > 16:
    return jnp.einsum("...k,...krs->...rs", values, atoms[chosen])

  @jax.checkpoint
  def one(value, index, atoms):
    return value[..., None, None] * atoms[index]

  places = range(chosen.shape[-1])
  terms = (one(values[..., place], chosen[..., place], atoms) for place in places)
  return functools.reduce(jnp.add, terms)


@typed
def low_rank_output(
  low_rank: Float[Array, "*batch R"], lora_b: Float[Array, "R D"], scaling: float
) -> Float[Array, "*batch D"]:
  """The last factor of step (6): scaling * (x A C) B, scaling being alpha/R or alpha/sqrt(R)."""
  return _product(scaling * low_rank, lora_b)
