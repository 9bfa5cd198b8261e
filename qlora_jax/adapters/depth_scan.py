"""The scan over blocks with a gradient that keeps the depth history once, not once per block.

The attention summary carries the states of all blocks, [N, *batch, R]. Automatic differentiation of
a scan keeps the carry of every block: N such histories, N^2 states per token. But a block only adds
its state, and reads only the states before it, so that the last history holds the states that every
block read. The gradient here keeps the inputs of the blocks and one history, and recomputes each
block from them, as `remat = 'full'` does.

The gradient in the history needs no second array of its size either. The backward pass does not
read the states of blocks that it has finished. Their slots take the gradients in the summaries that
those blocks read. `depth_gradient` computes the gradient of an earlier block's state from these, as
in flash attention. Letters as in `qlora_jax/typing.py`.
"""

import functools
from collections.abc import Callable

import jax
from jax import numpy as jnp

from qlora_jax.adapters import summary
from qlora_jax.typing import Array, PyTree

# step(params, fixed, hidden, summaries, index, shared, context) -> (hidden, state, record)
Step = Callable[..., tuple[Array, Array, PyTree]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(
  step: Step,
  params: PyTree,
  queries: dict[str, Array],
  fixed: PyTree,
  hidden: Array,
  history: Array,
  shared: PyTree,
  context: PyTree,
) -> tuple[Array, PyTree]:
  """Runs N blocks; returns the last hidden state, and the records stacked [N, ..].

  Args:
    step: one block. It gets the summary [*batch, R] of each router, by the names in `queries`, and
      returns its state [*batch, R], which the blocks after it read.
    params: trained parameters, stacked [N, ..].
    queries: pseudo-queries [N, R] of each router.
    fixed: frozen parameters, stacked [N, ..]; they have no gradient.
    hidden: [*batch, D].
    history: [N, *batch, R], zeros, in the dtype in which states are kept.
    shared: arrays that all blocks share, with a gradient: floating point.
    context: arrays that all blocks share, without a gradient.
  """
  (hidden, _), (_, records) = _forward(
    step, params, queries, fixed, hidden, history, shared, context
  )
  return hidden, records


def _read(history, queries, index):
  return {name: summary.depth_attention(history, query, index) for name, query in queries.items()}


def _write(carry: Array, state: Array, index: Array) -> Array:
  return summary.write("attention", carry, state, index, None)


def _forward(step, params, queries, fixed, hidden, history, shared, context):
  def body(carry, inputs):
    (hidden, history), (params, queries, fixed, index) = carry, inputs
    read = _read(history, queries, index)
    after, state, record = step(params, fixed, hidden, read, index, shared, context)
    return (after, _write(history, state, index)), (hidden, record)

  indices = jnp.arange(len(history), dtype=jnp.int32)
  return jax.lax.scan(body, (hidden, history), (params, queries, fixed, indices))


def _scan_forward(step, *primals):
  values = jax.tree.map(lambda leaf: leaf.value, primals)
  if any(leaf.perturbed for leaf in jax.tree.leaves(primals[2])):
    raise ValueError("the base of a routed adapter is frozen: it has no gradient")
  params, queries, fixed, _, _, shared, context = values
  (hidden, history), (inputs, records) = _forward(step, *values)
  return (hidden, records), (params, queries, fixed, inputs, history, shared, context)


def _scan_backward(step, residuals, grads):
  params, queries, fixed, inputs, history, shared, context = residuals
  all_queries, (grad_hidden, grad_records) = queries, grads
  zero = jax.custom_derivatives.SymbolicZero
  # With the penalties on the routing off, no array of zeros [N, ..] is made for them.
  routed = not all(isinstance(leaf, zero) for leaf in jax.tree.leaves(grad_records))
  grad_records = jax.tree.map(_instantiated, grad_records) if routed else None
  first = next(iter(queries))  # the gradients of this router replace the states

  def body(carry, inputs):
    grad_hidden, slots, log_sums, dots, grad_shared = carry
    params, queries, fixed, hidden, grad_record, index = inputs

    def block(params, hidden, read, shared):
      after, state, record = step(params, fixed, hidden, read, index, shared, context)
      return (after, state, record) if routed else (after, state)

    read = _read(slots[first], queries, index)
    (_, state, *_), pull = jax.vjp(block, params, hidden, read, shared)
    left = jax.lax.dynamic_index_in_dim(slots[first], index, 0, keepdims=False)
    grad_state = sum(
      summary.depth_gradient(
        left, index, all_queries[name], slots[name], log_sums[name], dots[name]
      )
      for name in queries
    ).astype(state.dtype)
    grads = (grad_hidden, grad_state, grad_record) if routed else (grad_hidden, grad_state)
    grad_params, grad_hidden, grad_read, grad_block_shared = pull(grads)
    # The summaries are computed again: the softmax's results need not be kept through the block.
    slots, grad_read = jax.lax.optimization_barrier((slots, grad_read))
    read, pull = jax.vjp(lambda queries: _read(slots[first], queries, index), queries)
    (grad_queries,) = pull(grad_read)
    sums = {
      name: summary.depth_log_sum(slots[first], query, index) for name, query in queries.items()
    }
    grad_read = {name: grad.astype(history.dtype) for name, grad in grad_read.items()}
    products = {name: jnp.sum(grad_read[name] * read[name], axis=-1) for name in queries}
    # Every read of the states ends before they are overwritten, so that XLA makes no copy of them.
    slots, grad_read, grad_queries, sums, products = jax.lax.optimization_barrier(
      (slots, grad_read, grad_queries, sums, products)
    )
    written = tuple(
      {name: _write(stored[name], new[name], index) for name in queries}
      for stored, new in ((slots, grad_read), (log_sums, sums), (dots, products))
    )
    carry = (grad_hidden, *written, jax.tree.map(jnp.add, grad_shared, grad_block_shared))
    return carry, (grad_params, grad_queries)

  slots = {name: history if name == first else jnp.zeros_like(history) for name in queries}
  zeros = {name: jnp.zeros(history.shape[:-1], query.dtype) for name, query in queries.items()}
  start = (_instantiated(grad_hidden), slots, zeros, zeros, jax.tree.map(jnp.zeros_like, shared))
  indices = jnp.arange(len(history), dtype=jnp.int32)
  (grad_hidden, *_, grad_shared), (grad_params, grad_queries) = jax.lax.scan(
    body, start, (params, queries, fixed, inputs, grad_records, indices), reverse=True
  )
  return grad_params, grad_queries, None, grad_hidden, None, grad_shared, None


def _instantiated(grad: PyTree) -> Array:
  if isinstance(grad, jax.custom_derivatives.SymbolicZero):
    return jnp.zeros(grad.shape, grad.dtype)
  return grad


scan.defvjp(_scan_forward, _scan_backward, symbolic_zeros=True)
