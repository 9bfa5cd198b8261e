"""The residual MLP: its parameter tree, its shapes, and its errors."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from qlora_jax import errors
from qlora_jax.adapters import config
from qlora_jax.models import mlp

SHAPE = mlp.MLPConfig(inputs=5, width=8, hidden=12, layers=4, layers_per_block=2)
BASE = {
  "input/kernel": (5, 8),
  "input/bias": (8,),
  "norm/scale": (8,),
  "output/kernel": (8, 1),
  "output/bias": (1,),
}
for slot in ("stack/blocks/layer_0", "stack/blocks/layer_1"):
  BASE |= {
    f"{slot}/norm/scale": (2, 8),
    f"{slot}/up/kernel": (2, 8, 12),
    f"{slot}/up/bias": (2, 12),
    f"{slot}/down/kernel": (2, 12, 8),
    f"{slot}/down/bias": (2, 8),
  }


def low_rank(rank):
  factors = {}
  for slot in ("stack/blocks/layer_0", "stack/blocks/layer_1"):
    for name, inputs, outputs in (("up", 8, 12), ("down", 12, 8)):
      factors[f"{slot}/{name}/branch/lora_a"] = (2, inputs, rank)
      factors[f"{slot}/{name}/branch/lora_b"] = (2, rank, outputs)
  return factors


QUERYABLE = {
  "stack/memory/atoms": (5, 3, 3),
  "stack/memory/atom_keys": (5, 6),
  "stack/memory/atom_descriptors": (5, 4),
  "stack/blocks/router/query_state": (2, 3, 6),
  "stack/blocks/router/query_summary": (2, 3, 6),
  "stack/blocks/router/query_bias": (2, 6),
  "stack/blocks/router/pseudo_query": (2, 3),
}


def initialised(adapter):
  model = mlp.MLP(SHAPE, adapter)
  x, e = np.ones((3, 5), "f"), np.ones((3, 4), "f")
  return model, model.init(jax.random.key(0), x, e), x, e


def shapes(tree):
  flat = jax.tree_util.tree_flatten_with_path(jax.tree.map(lambda x: x, tree))[0]
  return {
    "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path): leaf.shape
    for path, leaf in flat
  }


@pytest.mark.parametrize(
  ("adapter", "expected"),
  [
    (config.AdapterConfig(family="lora", rank=3), low_rank(3)),
    (
      config.AdapterConfig(rank=3, atoms=5, query_dim=6, prior_weight=1.0, instruction_dim=4),
      low_rank(3) | QUERYABLE,
    ),
  ],
)
def test_the_parameter_tree_is_exactly_this(adapter, expected):
  from flax import linen as nn

  _, variables, _, _ = initialised(adapter)
  variables = nn.meta.unbox(variables)
  assert set(variables) == {"base", "params"}
  assert shapes(variables["base"]) == BASE
  assert shapes(variables["params"]) == expected
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}


def test_frozen_factors_are_a_separate_collection():
  from flax import linen as nn

  _, variables, _, _ = initialised(config.AdapterConfig(family="lora_xs", rank=3))
  variables = nn.meta.unbox(variables)
  assert set(variables) == {"base", "params", "frozen"}
  assert shapes(variables["frozen"]) == low_rank(3)
  assert all(shape == (2, 3, 3) for shape in shapes(variables["params"]).values())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_values_and_routing_have_the_documented_shapes(compiled, batch):
  adapter = config.AdapterConfig(rank=3, atoms=5, query_dim=6, prior_weight=1.0, instruction_dim=4)
  model, variables, _, _ = initialised(adapter)
  apply = jax.jit(model.apply) if compiled else model.apply
  out = apply(variables, np.ones((*batch, 5), "f"), np.ones((*batch, 4), "f"))
  assert out.values.shape == batch and out.values.dtype == np.float32
  assert out.routing.weights.shape == (2, 1, *batch, 5) == out.routing.logits.shape
  assert out.routing.log_prior.shape == (*batch, 5)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("inputs", 0, "not at least 1"),
    ("width", -1, "not at least 1"),
    ("hidden", 0, "at least 1"),
    ("layers", 0, "at least 1"),
    ("layers_per_block", 3, "use one of 1, 2, 4"),
  ],
)
def test_an_impossible_shape_is_refused_and_names_its_field(field, value, message):
  with pytest.raises(errors.UserError, match=message) as refused:
    mlp.MLPConfig(**{"layers": 4, "layers_per_block": 2} | {field: value})
  assert str(refused.value).startswith(f"model.{field}:")


@pytest.mark.parametrize("per_block", [1, 2, 4])
def test_a_base_in_larger_blocks_is_the_same_function(per_block):
  x = np.random.default_rng(0).normal(size=(3, 5)).astype("f")
  none = config.AdapterConfig(family="none")

  def network(layers_per_block):
    return mlp.MLP(mlp.dataclasses.replace(SHAPE, layers_per_block=layers_per_block), none)

  base = nn.meta.unbox(network(1).init(jax.random.key(0), x, None))["base"]
  regrouped = {"base": mlp.in_blocks(base, per_block)}
  np.testing.assert_allclose(
    network(per_block).apply(regrouped, x, None).values,
    network(1).apply({"base": base}, x, None).values,
    rtol=1e-5,
    atol=1e-6,
  )
