"""Gathering few of many atoms is the dense routed operator, values and gradients."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qlora_jax.adapters import functional


@pytest.mark.parametrize(("k", "equal"), [(1, False), (3, False), (3, True), (20, False)])
def test_a_gathered_operator_is_the_dense_one(k, equal):
  keys = jax.random.split(jax.random.key(0), 3)
  logits, atoms = jax.random.normal(keys[0], (5, 70)), jax.random.normal(keys[1], (70, 3, 3))
  grad = jax.random.normal(keys[2], (5, 3, 3))

  def dense(logits, atoms):
    weights = functional.sparse_weights(logits, k, equal)
    return jnp.sum(functional.routed_operator(weights, atoms) * grad), weights

  def sparse(logits, atoms):
    values, chosen = functional.sparse_choice(logits, k, equal)
    operator = functional.gathered_operator(values, chosen, atoms)
    return jnp.sum(operator * grad), functional.dense_weights(values, chosen, 70)

  (value, weights), grads = jax.value_and_grad(dense, (0, 1), has_aux=True)(logits, atoms)
  (sparse_value, sparse_weights), sparse_grads = jax.value_and_grad(sparse, (0, 1), has_aux=True)(
    logits, atoms
  )
  np.testing.assert_allclose(sparse_value, value, rtol=1e-5)
  np.testing.assert_allclose(sparse_weights, weights, atol=1e-6)
  for mine, other in zip(sparse_grads, grads, strict=True):
    np.testing.assert_allclose(mine, other, atol=1e-5)
