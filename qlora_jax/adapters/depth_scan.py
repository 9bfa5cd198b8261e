"""The scan over blocks with a gradient that keeps the depth history once, not once a block.

The attention summary carries the states of all blocks, [N, *batch, R]. Differentiated as written, a
scan keeps its carry at every block, so that N such histories are kept: N^2 states a token. But a
block only adds its own state, and reads only those before it: the last history holds what each
block read. So the gradient here keeps the inputs of the blocks and one history, and makes each
block again from them, as `remat = 'full'` does.

Nor does the gradient in the history take a second array of its size. Going back, the states of
blocks that are done are read no more; in their places stand the gradients in what those blocks
read, from which a block's state gets its own gradient when its turn comes (`depth_gradient`), as in
flash attention.
"""

import functools
from collections.abc import Callable

import jax
from jax import numpy as jnp

from qlora_jax.adapters import summary
from qlora_jax.typing import Array, PyTree

# step(own, fixed, hidden, summaries, index, shared, context) -> (hidden, state, record)
Step = Callable[..., tuple[Array, Array, PyTree]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(
  step: Step,
  own: PyTree,
  queries: dict[str, Array],
  fixed: PyTree,
  hidden: Array,
  history: Array,
  shared: PyTree,
  context: PyTree,
) -> tuple[Array, PyTree]:
  """Runs N blocks; returns the last hidden state, and the records stacked [N, ..].

  Args:
    step: one block, given the summary [*batch, R] that each of its routers reads, by the names in
      `queries`; it gives its own state [*batch, R], which the blocks after it read.
    own: trained parameters, stacked [N, ..].
    queries: pseudo-queries [N, R] of each router.
    fixed: frozen parameters, stacked [N, ..]; they have no gradient.
    hidden: [*batch, D].
    history: [N, *batch, R], zeros, in the dtype in which states are kept.
    shared: what all blocks share and the gradient reaches: floating point.
    context: what all blocks share and no gradient reaches.
  """
  (hidden, _), (_, records) = _forward(step, own, queries, fixed, hidden, history, shared, context)
  return hidden, records


def _read(history, queries, index):
  return {name: summary.depth_attention(history, each, index) for name, each in queries.items()}


def _write(carry: Array, state: Array, index: Array) -> Array:
  return summary.write("attention", carry, state, index, None)


def _forward(step, own, queries, fixed, hidden, history, shared, context):
  def body(carry, inputs):
    (hidden, history), (own, queries, fixed, index) = carry, inputs
    read = _read(history, queries, index)
    after, state, record = step(own, fixed, hidden, read, index, shared, context)
    return (after, _write(history, state, index)), (hidden, record)

  indices = jnp.arange(len(history), dtype=jnp.int32)
  return jax.lax.scan(body, (hidden, history), (own, queries, fixed, indices))


def _scan_forward(step, *primals):
  values = jax.tree.map(lambda leaf: leaf.value, primals)
  if any(leaf.perturbed for leaf in jax.tree.leaves(primals[2])):
    raise ValueError("the base of a routed adapter is frozen: it has no gradient")
  own, queries, fixed, _, _, shared, context = values
  (hidden, history), (inputs, records) = _forward(step, *values)
  return (hidden, records), (own, queries, fixed, inputs, history, shared, context)


def _scan_backward(step, kept, grads):
  own, queries, fixed, inputs, history, shared, context = kept
  all_queries, (grad_hidden, grad_records) = queries, grads
  zero = jax.custom_derivatives.SymbolicZero
  # Penalties on the routing may be off: then no array of zeros [N, ..] is made for them.
  routed = not all(isinstance(leaf, zero) for leaf in jax.tree.leaves(grad_records))
  grad_records = jax.tree.map(_instantiated, grad_records) if routed else None
  first = next(iter(queries))  # its gradients take the places of the states

  def body(carry, inputs):
    grad_hidden, slots, log_sums, dots, grad_shared = carry
    own, queries, fixed, hidden, grad_record, index = inputs

    def block(own, hidden, read, shared):
      after, state, record = step(own, fixed, hidden, read, index, shared, context)
      return (after, state, record) if routed else (after, state)

    read = _read(slots[first], queries, index)
    (_, state, *_), pull = jax.vjp(block, own, hidden, read, shared)
    left = jax.lax.dynamic_index_in_dim(slots[first], index, 0, keepdims=False)
    grad_state = sum(
      summary.depth_gradient(
        left, index, all_queries[name], slots[name], log_sums[name], dots[name]
      )
      for name in queries
    ).astype(state.dtype)
    grads = (grad_hidden, grad_state, grad_record) if routed else (grad_hidden, grad_state)
    grad_own, grad_hidden, grad_read, used = pull(grads)
    # The states are read again rather than that what the softmax made waits for the whole block.
    slots, grad_read = jax.lax.optimization_barrier((slots, grad_read))
    read, pull = jax.vjp(lambda queries: _read(slots[first], queries, index), queries)
    (grad_queries,) = pull(grad_read)
    sums = {
      name: summary.depth_log_sum(slots[first], each, index) for name, each in queries.items()
    }
    grad_read = {name: each.astype(history.dtype) for name, each in grad_read.items()}
    products = {name: jnp.sum(grad_read[name] * read[name], axis=-1) for name in queries}
    # All that reads the states is done before they are written over: there is no copy of them.
    slots, grad_read, grad_queries, sums, products = jax.lax.optimization_barrier(
      (slots, grad_read, grad_queries, sums, products)
    )
    kept = tuple(
      {name: _write(carry[name], each[name], index) for name in queries}
      for carry, each in ((slots, grad_read), (log_sums, sums), (dots, products))
    )
    carry = (grad_hidden, *kept, jax.tree.map(jnp.add, grad_shared, used))
    return carry, (grad_own, grad_queries)

  slots = {name: history if name == first else jnp.zeros_like(history) for name in queries}
  zeros = {name: jnp.zeros(history.shape[:-1], each.dtype) for name, each in queries.items()}
  start = (_instantiated(grad_hidden), slots, zeros, zeros, jax.tree.map(jnp.zeros_like, shared))
  indices = jnp.arange(len(history), dtype=jnp.int32)
  (grad_hidden, *_, grad_shared), (grad_own, grad_queries) = jax.lax.scan(
    body, start, (own, queries, fixed, inputs, grad_records, indices), reverse=True
  )
  return grad_own, grad_queries, None, grad_hidden, None, grad_shared, None


def _instantiated(grad: PyTree) -> Array:
  if isinstance(grad, jax.custom_derivatives.SymbolicZero):
    return jnp.zeros(grad.shape, grad.dtype)
  return grad


scan.defvjp(_scan_forward, _scan_backward, symbolic_zeros=True)
