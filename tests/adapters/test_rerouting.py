"""Routing weights replaced, and atoms taken out of a network."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from qlora_jax import errors
from qlora_jax.adapters import factory, rerouting
from qlora_jax.models import mlp
from qlora_jax.training import step
from qlora_jax.workloads import regression_config as settings

SHAPE = mlp.MLPConfig(inputs=5, width=16, hidden=12, layers=3, layers_per_block=1)
RNG = np.random.default_rng(0)
BATCH = step.Batch(*(RNG.normal(size=size).astype("f") for size in ((6, 5), (6,), (6, 3))))


def build(name, **fields):
  """A model, and variables drawn at random: nothing is at its initial value."""
  fields = {"rank": 4, "atoms": 5, **fields}
  adapter = factory.make(name, fields, settings.shapes(SHAPE), budget=0, instruction_dim=3)
  model = mlp.MLP(SHAPE, adapter)
  key = jax.eval_shape(lambda: jax.random.key(0))
  shapes = jax.eval_shape(model.init, key, BATCH.features, BATCH.instruction)
  rng = np.random.default_rng(1)

  def draw(leaf):
    return rng.normal(0, 0.5, leaf.shape).astype("f")

  return model, jax.tree.map(draw, nn.meta.unbox(shapes))


def whole(model, variables):
  return jax.jit(model.apply)(variables, BATCH.features, BATCH.instruction)


def removed(model, variables, kept_atoms):
  apply = jax.jit(
    lambda kept_atoms: rerouting.without_atoms(
      model, variables, kept_atoms, BATCH.features, BATCH.instruction
    )
  )
  return apply(kept_atoms)


def delete(variables, atom):
  """The variables of a network whose memory never held an atom."""
  params = variables["params"]
  rows = {name: np.delete(leaf, atom, 0) for name, leaf in params["stack"]["memory"].items()}

  def mixture(path, leaf):
    return np.delete(leaf, atom, 1) if path[-1].key == "mixture" else leaf

  blocks = jax.tree_util.tree_map_with_path(mixture, params["stack"]["blocks"])
  stack = {**params["stack"], "memory": rows, "blocks": blocks}
  return {**variables, "params": {**params, "stack": stack}}


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("queryable", {"contraction": "product"}),
    ("queryable_prior_query", {"top_k": 2, "contraction": "gather"}),
    ("static", {"contraction": "operator"}),
  ],
)
def test_an_atom_removed_everywhere_is_an_atom_that_was_never_there(name, fields):
  model, variables = build(name, **fields)
  smaller, _ = build(name, **fields, atoms=4)
  kept_atoms = np.ones((3, 5), bool)
  kept_atoms[:, 1] = False
  actual, expected = removed(model, variables, kept_atoms), whole(smaller, delete(variables, 1))
  np.testing.assert_allclose(actual.values, expected.values, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(
    np.delete(actual.routing.weights, 1, -1), expected.routing.weights, rtol=1e-3, atol=1e-5
  )


def test_removal_in_one_block_renormalises_there_and_nowhere_before():
  model, variables = build("queryable")
  kept_atoms = np.ones((3, 5), bool)
  same = removed(model, variables, kept_atoms)
  kept_atoms = kept_atoms.copy()  # the call before may still be reading it
  kept_atoms[1, 2] = False
  before = whole(model, variables)
  np.testing.assert_allclose(same.values, before.values, rtol=1e-4)  # nothing is out, nothing new
  before, part = before.routing.weights, removed(model, variables, kept_atoms).routing.weights
  np.testing.assert_allclose(part[0], before[0], rtol=1e-4)
  np.testing.assert_array_equal(part[1, ..., 2], 0.0)
  rest = np.delete(before[1], 2, -1)
  np.testing.assert_allclose(
    np.delete(part[1], 2, -1), rest / rest.sum(-1, keepdims=True), rtol=1e-3, atol=1e-6
  )
  assert np.abs(part[2] - before[2]).max() > 1e-4 and (part[2, ..., 2] > 0).all()


ROUTERS = [
  ("queryable", {"contraction": "product"}),
  ("queryable", {"operator": "map", "contraction": "operator"}),
  ("queryable_prior_query", {"top_k": 2, "contraction": "gather"}),
  ("queryable_recurrent", {"memory": "map", "operator": "map"}),
  ("static", {"contraction": "operator"}),
  ("comol", {}),
  ("comol", {"top_k": 2, "contraction": "gather"}),
  ("lily", {}),
]


def replaced(model, variables, weights):
  def apply(weights):
    return rerouting.with_weights(model, variables, weights, BATCH.features, BATCH.instruction)

  return jax.jit(apply)(weights)


@pytest.mark.parametrize(("name", "fields"), ROUTERS)
def test_the_trained_weights_put_back_change_nothing(name, fields):
  """Fails where a replacement lands in another block or another router of the block."""
  model, variables = build(name, **fields)
  trained = whole(model, variables)
  again = replaced(model, variables, trained.routing.weights)
  np.testing.assert_allclose(again.values, trained.values, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(again.routing.weights, trained.routing.weights)
  np.testing.assert_allclose(again.routing.logits, trained.routing.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "fields"), ROUTERS)
def test_uniform_weights_are_a_memory_of_its_mean_atom(name, fields):
  model, variables = build(name, **fields)
  blocks, routers, *_, atoms = whole(model, variables).routing.weights.shape
  uniform = np.full((blocks, routers, atoms), 1 / atoms, "f")
  params = jax.tree_util.tree_map_with_path(_mean_atom, variables["params"])
  expected = whole(model, {**variables, "params": params}).values
  actual = replaced(model, variables, uniform).values
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)
  assert np.abs(actual - whole(model, variables).values).max() > 1e-3


def _mean_atom(path, leaf):
  """Every atom becomes the mean of all: then any convex weights give what uniform ones give."""
  name = path[-1].key
  if name.startswith(("atoms", "lily_b")):
    return np.broadcast_to(leaf.mean(axis=0, keepdims=True), leaf.shape)
  if name == "cores":
    return np.broadcast_to(leaf.mean(axis=1, keepdims=True), leaf.shape)
  return leaf


def test_weights_of_other_rows_make_other_rows():
  """With a routing of the instruction alone, exchanged weights are exchanged instructions."""
  model, variables = build(
    "queryable_query",
    query_state=False,
    query_bias=False,
    summary="none",
    memory="map",
    operator="map",
  )
  weights = whole(model, variables).routing.weights
  other = np.roll(np.arange(len(BATCH.features)), 1)
  actual = replaced(model, variables, weights[:, :, other]).values
  apply = jax.jit(model.apply)
  expected = apply(variables, BATCH.features, BATCH.instruction[other]).values
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora", "lora_xs", "full"])
def test_an_adapter_without_a_router_has_no_weights_to_replace(name):
  model, variables = build(name)
  with pytest.raises(errors.UserError, match="no routing weights"):
    replaced(model, variables, np.full((3, 1, 5), 0.2, "f"))


def test_movement_is_relative_to_the_spread_between_atoms():
  rng = np.random.default_rng(2)
  atoms, keys, kernel = (rng.normal(size=s).astype("f") for s in ((5, 3, 3), (5, 2), (4, 3, 2)))
  start = {
    "memory": {"atoms": 7 + 0.1 * atoms, "atom_keys": keys},
    "router": {"query_state": kernel, "query_bias": np.zeros((4, 2), "f")},
    "lora_a": np.ones(3, "f"),
  }
  now = jax.tree.map(np.array, start)
  now["memory"]["atoms"] = start["memory"]["atoms"] + 0.1 * (atoms - atoms.mean(0))
  now["memory"]["atom_keys"] = keys + 0.5 * (keys - keys.mean(0))
  now["router"]["query_state"] = 3 * kernel
  now["lora_a"] = np.zeros(3, "f")
  moved = rerouting.movement(start, now)
  np.testing.assert_allclose(
    [moved["atoms"], moved["keys"], moved["router"]], [1.0, 0.5, 2.0], rtol=1e-4
  )
  static = {"router": {"mixture": np.zeros((4, 5), "f")}}
  assert all(np.isnan(value) for value in rerouting.movement(static, static).values())


def test_lora_has_nothing_to_remove():
  model, variables = build("lora")
  with pytest.raises(errors.UserError, match="no memory"):
    rerouting.without_atoms(
      model, variables, np.ones((3, 5), bool), BATCH.features, BATCH.instruction
    )
