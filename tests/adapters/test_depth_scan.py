"""The scan that keeps one depth history has the gradient of the scan that keeps N of them."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from jax.extend import core

from qlora_jax.adapters import config as adapter_config
from qlora_jax.adapters import losses
from qlora_jax.models import decoder

SHAPE = decoder.DecoderConfig(
  vocabulary=32, width=8, hidden=8, layers=3, heads=1, groups=1, head_dim=8, adapted=("q", "v")
)
ROWS, LENGTH = 2, 6


def gradient(adapter, remat):
  """(function of params -> loss and gradient, params): the reference does not remake blocks."""
  model = decoder.Decoder(dataclasses.replace(SHAPE, remat=remat), adapter)
  tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, 32)
  drawn = nn.meta.unbox(model.init(jax.random.key(0), tokens, method="initialise"))
  params = jax.tree.map(
    lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
    drawn["params"],
  )

  def loss(params, base):
    output = model.apply({"params": params, "base": base}, tokens)
    return jnp.sum(jnp.sin(output.hidden)) + losses.penalty(adapter, output.routing)

  return loss, params, drawn["base"]


@pytest.mark.parametrize(
  "fields",
  [
    {"top_k": 2, "contraction": "gather"},
    {"z_loss_weight": 0.01, "load_balance_weight": 0.1},
    {"operator": "map"},
  ],
  ids=["sparse", "penalties", "routers"],
)
def test_the_gradient_is_that_of_the_plain_scan(fields):
  adapter = adapter_config.AdapterConfig(rank=4, atoms=8, **fields)
  (loss, params, base), (plain, _, _) = (gradient(adapter, remat) for remat in ("full", "none"))
  value, grads = jax.jit(jax.value_and_grad(loss))(params, base)
  expected_value, expected = jax.jit(jax.value_and_grad(plain))(params, base)
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  for grad, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
    assert np.abs(other).max() > 0
    np.testing.assert_allclose(grad, other, rtol=2e-4, atol=2e-4 * np.abs(other).max())


def test_no_array_holds_a_history_for_every_block():
  adapter = adapter_config.AdapterConfig(rank=4, atoms=8)
  squared = f"[{SHAPE.blocks},{SHAPE.blocks},{ROWS},{LENGTH},4]"
  texts = {}
  for remat in ("full", "dots"):
    loss, params, base = gradient(adapter, remat)
    texts[remat] = str(jax.make_jaxpr(jax.grad(loss))(params, base))
  assert squared in texts["dots"]  # as a scan is differentiated
  assert squared not in texts["full"]


def test_going_back_one_array_holds_states_and_gradients():
  loss, params, base = gradient(adapter_config.AdapterConfig(rank=4, atoms=8), "full")
  (back,) = scans(jax.make_jaxpr(jax.grad(loss))(params, base).jaxpr, reverse=True)
  carried = back.invars[back.params["num_consts"] :][: back.params["num_carry"]]
  shapes = [variable.aval.shape for variable in carried]
  assert shapes.count((SHAPE.blocks, ROWS, LENGTH, 4)) == 1


def scans(jaxpr, reverse):
  """The scans of a jaxpr, and of those in it, that run in one direction."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "scan" and equation.params["reverse"] == reverse:
      yield equation
    for inner in core.jaxprs_in_params(equation.params):
      yield from scans(inner, reverse)


def test_a_gradient_of_the_frozen_base_is_refused():
  loss, params, base = gradient(adapter_config.AdapterConfig(rank=4, atoms=8), "full")
  with pytest.raises(ValueError, match="frozen"):
    jax.eval_shape(jax.grad(loss, argnums=1), params, base)
