"""Training some groups of the tree alone, and going on from given weights."""

import jax
import numpy as np
import pytest

from qlora_jax import errors
from qlora_jax.adapters import factory
from qlora_jax.data import pipeline
from qlora_jax.models import mlp
from qlora_jax.training import loop, optimizer, progress
from qlora_jax.workloads import cohort_program as group
from qlora_jax.workloads import feed, regression
from qlora_jax.workloads import regression_config as settings

# Three blocks: the pseudo-query of the last is the first with a gradient.
SHAPE = mlp.MLPConfig(inputs=5, width=16, hidden=12, layers=3, layers_per_block=1)
SEEDS = (0, 1)


def make(frozen, **fields):
  adapter = factory.make(
    "queryable", {"rank": 4, "atoms": 5}, settings.shapes(SHAPE), budget=0, instruction_dim=0
  )
  config = optimizer.OptimizerConfig(
    **{"steps": 7, "batch_size": 8, "warmup": 0.0, "frozen": frozen, **fields}
  )
  return group.program(mlp.MLP(SHAPE, adapter), config)


@pytest.fixture(scope="module")
def data():
  rng = np.random.default_rng(0)
  rows = pipeline.Arrays(
    rng.normal(size=(40, 5)).astype("f"),
    *rng.normal(size=(2, 40)).astype("f"),
    *np.zeros((2, 40), np.int32),
  )
  return feed.Feed(
    {seed: {"train": rows.take(np.arange(40) % 2 == seed)} for seed in SEEDS},
    np.zeros((1, 1), np.float32),
    8,
    7,
  )


def trained(program, states, frozen, data):
  """The states after all steps."""
  training = regression.Training("test", program, data, SEEDS, np.arange(2), states, frozen, 7)
  with progress.Display(total_trials=0, plain=True) as display:
    return loop.fit(training, training.init(), None, display)[0]


def moved(program, data):
  """Names of the leaves, and whether all steps from a start without zeros moved them."""
  rates = np.array([0.05, 0.05])
  states, frozen = program.init(settings.random_base(SHAPE, 0), np.array(SEEDS), rates)
  params = jax.tree.map(lambda x: x + 0.1, states.params)
  states = trained(program, program.start(params, rates), frozen, data)
  changed = jax.tree_util.tree_map_with_path(
    lambda path, a, b: (path, bool((np.asarray(a) != np.asarray(b)).any())), params, states.params
  )
  leaves = jax.tree.leaves(changed, is_leaf=lambda x: isinstance(x, tuple))
  names = {"/".join(key.key for key in path): different for path, different in leaves}
  return names


@pytest.mark.parametrize("frozen", [(), ("atoms",), ("memory", "other")])
def test_only_what_is_not_frozen_moves(data, frozen):
  names = moved(make(frozen, weight_decay=0.1), data)
  for name, different in names.items():
    kind = "memory" if "/memory/" in name else "router" if "/router/" in name else "other"
    still = kind in frozen or ("atoms" in frozen and name.endswith("/atoms"))
    assert different != still, name


def test_frozen_groups_have_no_moments_and_do_not_count_in_the_clip():
  grads = {"stack": {"memory": {"atoms": np.full(3, 100.0)}, "router": np.full(2, 0.3)}}
  tx = optimizer.make(optimizer.OptimizerConfig(frozen=("memory",), steps=5, warmup=0.2))
  alone = optimizer.make(optimizer.OptimizerConfig(steps=5, warmup=0.2))
  small = {"stack": {"router": grads["stack"]["router"]}}
  state, own = tx.init(grads), alone.init(small)
  assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(own))
  for _ in range(2):  # AdamW hides a constant factor at first, not the ratio of two steps
    updates, state = tx.update(grads, state, grads)
    expected, own = alone.update(small, own, small)
    grads = jax.tree.map(lambda x: 0.5 * x, grads)
    small = jax.tree.map(lambda x: 0.5 * x, small)
  np.testing.assert_allclose(updates["stack"]["router"], expected["stack"]["router"], rtol=1e-6)


def test_an_unknown_group_is_told():
  with pytest.raises(errors.UserError, match="'keys' is unknown"):
    optimizer.OptimizerConfig(frozen=("keys",))


def test_a_start_from_drawn_weights_is_the_drawn_start(data):
  program = make(())
  rates = np.array([0.05, 0.05])
  drawn, frozen = program.init(settings.random_base(SHAPE, 0), np.array(SEEDS), rates)
  again = program.start(drawn.params, rates)
  jax.tree.map(np.testing.assert_array_equal, drawn, again)
  kept = jax.device_get(drawn.params)
  trained(program, again, frozen, data)
  jax.tree.map(np.testing.assert_array_equal, kept, jax.device_get(drawn.params))  # not given up


def test_a_transplant_takes_the_named_groups_and_nothing_else():
  program = make(())
  states, _ = program.init(settings.random_base(SHAPE, 0), np.array(SEEDS), np.zeros(2))
  own = states.params
  source = jax.tree.map(lambda leaf: leaf + 1.0, own)
  for groups, count in ((("memory",), 2), (("atoms",), 1), (("memory", "other"), 6)):
    made = optimizer.transplant(own, source, groups)
    taken = [a is b for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(source), strict=True)]
    kept = [a is b for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(own), strict=True)]
    assert sum(taken) == count and all(a != b for a, b in zip(taken, kept, strict=True))
  assert made["stack"]["memory"] == source["stack"]["memory"]
  other = jax.tree.map(lambda leaf: leaf[:, :1], source)
  for wrong, told in (({}, "is missing"), (other, "has shape")):
    with pytest.raises(errors.UserError, match=told):
      optimizer.transplant(own, wrong, ("memory",))
