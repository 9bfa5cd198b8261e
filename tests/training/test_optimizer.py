"""Weight decay: which leaves it pulls to zero, and that it changes nothing where it is off."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from qlora_jax.adapters import config
from qlora_jax.models import decoder, mlp
from qlora_jax.training import optimizer

SHAPE = mlp.MLPConfig(inputs=5, width=8, hidden=6, layers=2, layers_per_block=1)
ALL = {
  "instruction_dim": 4,
  "rank": 3,
  "atoms": 5,
  "instruction_in_input": True,
  "prior_weight": 1.0,
  "prior_dim": 2,
  "instruction_in_query": True,
}
ADAPTERS = {
  "queryable": {},
  "recurrent": {"summary": "recurrent"},
  "static": {"routing": "static", "summary": "none"},
  "memory per map": {"operator": "map", "memory": "map"},
  **{name: {"family": name} for name in ("lora", "dora", "lora_xs", "comol", "lily")},
}
FACTORS = {
  "instruction_input",
  "lora_a",
  "lora_b",
  "core",
  "lily_b_up",
  "lily_b_down",
}


def tree_of(fields):
  """The trained tree of an MLP, all entries 1."""
  model = mlp.MLP(SHAPE, config.AdapterConfig(**(ALL | fields)))
  arrays = np.ones((2, 5), "f"), np.ones((2, 4), "f")
  abstract = jax.eval_shape(lambda key: model.init(key, *arrays), jax.random.key(0))
  return jax.tree.map(lambda leaf: np.ones(leaf.shape, "f"), nn.meta.unbox(abstract)["params"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_factors_alone_have_decay(name):
  marks = jax.tree_util.tree_flatten_with_path(optimizer.decayed(tree_of(ADAPTERS[name])))[0]
  for path, mark in marks:
    assert mark == (path[-1].key in FACTORS), jax.tree_util.keystr(path)
  assert {"instruction_input"} < {path[-1].key for path, _ in marks}


@pytest.mark.parametrize("frozen", [(), ("router",)])
def test_decay_leaves_atoms_and_magnitude_and_pulls_on_lora_b(frozen):
  one = np.ones(3, "f")
  params = {
    "stack": {
      "memory": {"atoms": one, "atoms_up": one, "atom_keys": one, "lily_b_up": one},
      "blocks": {"up": {"branch": {"lora_a": one, "lora_b": one, "magnitude": one, "cores": one}}},
    }
  }
  config = optimizer.OptimizerConfig(steps=20, warmup=0.1, weight_decay=0.5, frozen=frozen)
  tx = optimizer.make(config)
  state, zero = tx.init(params), jax.tree.map(np.zeros_like, params)
  for _ in range(10):
    updates, state = tx.update(zero, state, params)
    params = optax.apply_updates(params, jax.tree.map(lambda update: 0.1 * update, updates))
  # prod over the schedule of (1 - rate * factor * decay): two steps of warm-up, then a cosine.
  factors = [0, 0.5, *(0.5 + 0.5 * np.cos(np.pi * np.arange(8) / 18))]
  shrunk = np.prod([1 - 0.1 * factor * 0.5 for factor in factors])
  for path, values in jax.tree_util.tree_flatten_with_path(params)[0]:
    if path[-1].key in FACTORS:
      np.testing.assert_allclose(values, shrunk, rtol=1e-5)
    else:
      np.testing.assert_array_equal(values, 1.0)


def test_full_fine_tuning_decays_matrices_and_no_scales_or_biases():
  model = decoder.DecoderConfig(
    vocabulary=17,
    width=8,
    hidden=10,
    layers=2,
    heads=2,
    groups=2,
    head_dim=4,
    qk_norm=True,
    norm="layer",
    qkv_bias=True,
    learned_positions=9,
  )
  base = decoder.abstract(model, config.AdapterConfig(family="full"))["base"]
  marks = optimizer.decayed({"base": nn.meta.unbox(base)})
  names = {(path[-1].key, mark) for path, mark in jax.tree_util.tree_flatten_with_path(marks)[0]}
  assert names == {
    ("kernel", True),
    ("embedding", True),
    ("positions", True),
    ("head", True),
    ("scale", False),
    ("bias", False),
  }


def test_without_decay_state_and_updates_are_those_of_adam():
  params = {"atoms": np.ones(3, "f"), "lora_b": np.full(3, 2.0, "f")}
  grads = {"atoms": np.array([1, -2, 3], "f"), "lora_b": np.array([0, 1, -1], "f")}
  own = optimizer.OptimizerConfig(steps=5, clip=1.0)
  tx = optimizer.make(own)
  plain = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(own.b1, own.b2, own.eps),
    optax.scale_by_schedule(lambda count: -optimizer.schedule(own)(count)),
  )
  state, other = tx.init(params), plain.init(params)
  assert jax.tree.structure(state) == jax.tree.structure(other)
  for _ in range(3):
    updates, state = tx.update(grads, state, params)
    expected, other = plain.update(grads, other, params)
  jax.tree.map(np.testing.assert_array_equal, updates, expected)
