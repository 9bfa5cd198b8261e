"""Atoms taken out of a network."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from qlora_jax import errors
from qlora_jax.adapters import factory, removal
from qlora_jax.models import mlp
from qlora_jax.training import settings, step

SHAPE = mlp.MLPConfig(inputs=5, width=16, hidden=12, layers=3, layers_per_block=1)
RNG = np.random.default_rng(0)
BATCH = step.Batch(
  *(RNG.normal(size=size).astype("f") for size in ((6, 5), (6,), (6, 3)))
)  # fmt: skip


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


def removed(model, variables, kept):
  apply = jax.jit(lambda kept: removal.apply(
    model, variables, kept, BATCH.features, BATCH.instruction
  ))  # fmt: skip
  return apply(kept)


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
  kept = np.ones((3, 5), bool)
  kept[:, 1] = False
  found, expected = removed(model, variables, kept), whole(smaller, delete(variables, 1))
  np.testing.assert_allclose(found.values, expected.values, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(
    np.delete(found.routing.weights, 1, -1), expected.routing.weights, rtol=1e-3, atol=1e-5
  )


def test_removal_in_one_block_renormalises_there_and_nowhere_before():
  model, variables = build("queryable")
  kept = np.ones((3, 5), bool)
  same = removed(model, variables, kept)
  kept = kept.copy()  # the call before may still be reading it
  kept[1, 2] = False
  before = whole(model, variables)
  np.testing.assert_allclose(same.values, before.values, rtol=1e-4)  # nothing is out, nothing new
  before, part = before.routing.weights, removed(model, variables, kept).routing.weights
  np.testing.assert_allclose(part[0], before[0], rtol=1e-4)
  np.testing.assert_array_equal(part[1, ..., 2], 0.0)
  rest = np.delete(before[1], 2, -1)
  np.testing.assert_allclose(
    np.delete(part[1], 2, -1), rest / rest.sum(-1, keepdims=True), rtol=1e-3, atol=1e-6
  )
  assert np.abs(part[2] - before[2]).max() > 1e-4 and (part[2, ..., 2] > 0).all()


def test_lora_has_nothing_to_remove():
  model, variables = build("lora")
  with pytest.raises(errors.UserError, match="no memory"):
    removal.apply(model, variables, np.ones((3, 5), bool), BATCH.features, BATCH.instruction)
