"""The scan over blocks with a gradient that keeps the depth history once, not once a block.

The attention summary carries the states of all blocks, [N, *batch, R]. Differentiated as written, a
scan keeps its carry at every block, so that N such histories are kept: N^2 states a token. But a
block only adds its own state, and reads only those before it: the last history holds what each
block read. So the gradient here keeps the inputs of the blocks and one history, and makes each
block again from them, as `remat = 'full'` does.
"""

import functools
from collections.abc import Callable

import jax
from jax import numpy as jnp

from qlora_jax.adapters import summary
from qlora_jax.typing import Array, PyTree

# step(own, fixed, hidden, history, index, shared, context) -> (hidden, state, record)
Step = Callable[..., tuple[Array, Array, PyTree]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(
  step: Step,
  own: PyTree,
  fixed: PyTree,
  hidden: Array,
  history: Array,
  shared: PyTree,
  context: PyTree,
) -> tuple[Array, PyTree]:
  """Runs N blocks; returns the last hidden state, and the records stacked [N, ..].

  Args:
    step: one block, which reads of the history only what blocks before `index` left, and gives its
      own state [*batch, R], to be kept at `index`.
    own: trained parameters, stacked [N, ..].
    fixed: frozen parameters, stacked [N, ..]; they have no gradient.
    hidden: [*batch, D].
    history: [N, *batch, R], zeros, in the dtype in which states are kept.
    shared: what all blocks share and the gradient reaches: floating point.
    context: what all blocks share and no gradient reaches.
  """
  (hidden, _), (_, records) = _forward(step, own, fixed, hidden, history, shared, context)
  return hidden, records


def _forward(step, own, fixed, hidden, history, shared, context):
  def body(carry, inputs):
    (hidden, history), (own, fixed, index) = carry, inputs
    after, state, record = step(own, fixed, hidden, history, index, shared, context)
    return (after, summary.write("attention", history, state, index, None)), (hidden, record)

  indices = jnp.arange(len(history), dtype=jnp.int32)
  return jax.lax.scan(body, (hidden, history), (own, fixed, indices))


def _scan_forward(step, *primals):
  values = jax.tree.map(lambda leaf: leaf.value, primals)
  if any(leaf.perturbed for leaf in jax.tree.leaves(primals[1])):
    raise ValueError("the base of a routed adapter is frozen: it has no gradient")
  own, fixed, _, _, shared, context = values
  (hidden, history), (inputs, records) = _forward(step, *values)
  return (hidden, records), (own, fixed, inputs, history, shared, context)


def _scan_backward(step, kept, grads):
  own, fixed, inputs, history, shared, context = kept
  grad_hidden, grad_records = grads
  zero = jax.custom_derivatives.SymbolicZero
  # Penalties on the routing may be off: then no array of zeros [N, ..] is made for them.
  routed = not all(isinstance(leaf, zero) for leaf in jax.tree.leaves(grad_records))
  grad_records = jax.tree.map(_instantiated, grad_records) if routed else None

  def body(carry, inputs):
    grad_hidden, grad_history, grad_shared = carry
    own, fixed, hidden, grad_record, index = inputs

    def block(own, hidden, history, shared):
      after, state, record = step(own, fixed, hidden, history, index, shared, context)
      return (after, state, record) if routed else (after, state)

    (_, state, *_), pull = jax.vjp(block, own, hidden, history, shared)
    grad_state = jax.lax.dynamic_index_in_dim(grad_history, index, 0, keepdims=False)
    grad_state = grad_state.astype(state.dtype)
    grads = (grad_hidden, grad_state, grad_record) if routed else (grad_hidden, grad_state)
    grad_own, grad_hidden, read, used = pull(grads)
    # Slots from `index` on get nothing from `read`: the block did not see them.
    grad_history = grad_history + read.astype(grad_history.dtype)
    return (grad_hidden, grad_history, jax.tree.map(jnp.add, grad_shared, used)), grad_own

  # Summed over the blocks in the dtype of the states, as the hidden state's gradient is in its own.
  grad_history = jnp.zeros_like(history)
  start = (_instantiated(grad_hidden), grad_history, jax.tree.map(jnp.zeros_like, shared))
  indices = jnp.arange(len(history), dtype=jnp.int32)
  (grad_hidden, _, grad_shared), grad_own = jax.lax.scan(
    body, start, (own, fixed, inputs, grad_records, indices), reverse=True
  )
  return grad_own, None, grad_hidden, None, grad_shared, None


def _instantiated(grad: PyTree) -> Array:
  if isinstance(grad, jax.custom_derivatives.SymbolicZero):
    return jnp.zeros(grad.shape, grad.dtype)
  return grad


scan.defvjp(_scan_forward, _scan_backward, symbolic_zeros=True)
