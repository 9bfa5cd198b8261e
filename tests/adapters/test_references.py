"""Every adapter family, forward, against the NumPy float64 of `reference.py`: models end to end.

All parameters are random and none is zero or one, alpha is not R, R is not M and k is below M:
starting values hide mistakes.
"""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import config, losses
from qlora_jax.models import decoder, mlp
from tests.adapters import reference

E = 4
COMMON = {"rank": 3, "atoms": 5, "alpha": 5.0, "query_dim": 6, "instruction_dim": E}
PRIOR = {"prior_weight": 0.7, "prior_temperature": 0.6}
FAMILIES = {
  "lora": {"family": "lora"},
  "rslora": {"family": "rslora"},
  "dora": {"family": "dora"},
  "lora_xs": {"family": "lora_xs"},
  "comol": {"family": "comol"},
  "lily": {"family": "lily"},
  "queryable": {},
  "top-k": {"top_k": 2},
  "uniform": {"top_k": 2, "weights": "equal"},
  "recurrent summary": {"summary": "recurrent"},
  "no summary": {"summary": "none"},
  "output history": {"history": "output"},
  "static": {"routing": "static", "summary": "none"},
  "static with prior": {"routing": "static", "summary": "none", **PRIOR},
  "prior": PRIOR,
  "prior and query": {**PRIOR, "prior_dim": 3, "instruction_in_query": True},
  "operator per map": {"operator": "map", **PRIOR, "top_k": 2},
  "memory per map": {"operator": "map", "memory": "map", "instruction_in_query": True},
}
# Fields that only the MLP, which compiles faster, is run with.
DETAILS = {
  "lora, input": {"family": "lora", "instruction_in_input": True},
  "lora, alpha = R": {"family": "lora", "alpha": 0.0},
  "lora, ranks per map": {"family": "lora", "map_ranks": (("down", 4),)},
  "comol, top-k": {"family": "comol", "top_k": 2},
  "lily, top-k": {"family": "lily", "top_k": 2},
  "sqrt_rank": {"scaling": "sqrt_rank"},
  "uniform over all": {"weights": "equal"},
  "temperature": {"temperature": 2.5, "top_k": 3},
  "operator per map, recurrent": {"operator": "map", "summary": "recurrent"},
  "KL": {"kl_weight": 0.3},
  "KL, top-k, prior": {"kl_weight": 0.3, "top_k": 2, **PRIOR},
  "query without state and bias": {"query_state": False, "query_bias": False},
  "product": {"contraction": "product", "top_k": 2},
  "gather": {"contraction": "gather", "top_k": 2},
}
# Three blocks: the summary of the last is the first that weighs two states.
SHAPE = mlp.MLPConfig(inputs=5, width=8, hidden=10, layers=6, layers_per_block=2)
SHALLOW = dataclasses.replace(SHAPE, layers=3, layers_per_block=1)
DECODER = decoder.DecoderConfig(
  vocabulary=17,
  width=8,
  hidden=10,
  layers=3,
  layers_per_block=1,
  heads=4,
  groups=2,
  head_dim=4,
)


def random_tree(abstract, seed):
  """Values around 0, of scales and magnitudes around 1, for a tree of shapes."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    around_one = path[-1].key in ("scale", "magnitude")
    # Base kernels keep the size of their input, so that all branches stay visible.
    size = leaf.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.4
    return (around_one + size * rng.normal(size=leaf.shape)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, abstract)


def randomised(model, init, seed=0):
  """Variables of the model with random values; the frozen factors are made from the base."""
  abstract = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))
  variables = random_tree({name: abstract[name] for name in ("base", "params")}, seed)
  if "frozen" in abstract:
    with jax.disable_jit():
      _, drawn = model.apply(
        {"base": variables["base"]},
        *init.inputs,
        mutable=["params", "frozen"],
        rngs={"params": jax.random.key(0)},
      )
    variables["frozen"] = nn.meta.unbox(drawn["frozen"])
  return variables


class Init:
  """`model.init` at given inputs."""

  def __init__(self, model, inputs, **options):
    self.model, self.inputs, self.options = model, inputs, options

  def __call__(self, key):
    return self.model.init(key, *self.inputs, **self.options)


def close(actual, expected, what=""):
  """float32 against float64 through six layers.

  A rounding error of 6e-8 grows with the layers and the softmaxes to at most 1e-5 of the largest
  value here; the tolerance is ten times that.
  """
  actual = np.asarray(actual, np.float64)
  assert actual.shape == expected.shape, what
  error = np.abs(actual - expected).max() / np.abs(expected).max()
  assert error < 1e-4, f"{what}: relative error {error:.1e}"


def compare(adapter, output, routing, expected):
  values, weights, logits, log_prior = expected
  close(output, values, "output")
  assert (routing.weights is None) == (weights is None)
  if weights is not None:
    close(routing.logits, logits, "logits")
    close(routing.weights, weights, "weights")
  if log_prior is not None:
    close(routing.log_prior, log_prior, "prior")
    adapter_of_penalty = config.AdapterConfig(kl_weight=0.3, instruction_dim=E)
    penalty = losses.penalty(adapter_of_penalty, routing)
    close(penalty, np.asarray(0.3 * reference.kl_to_prior(weights, log_prior)), "KL")


@pytest.mark.parametrize("name", [*FAMILIES, *DETAILS])
def test_the_mlp_follows_the_equations(name):
  adapter = config.AdapterConfig(**(COMMON | {**FAMILIES, **DETAILS}[name]))
  rng = np.random.default_rng(1)
  inputs = rng.normal(size=(2, 5, 5)).astype("f"), rng.normal(size=(2, 5, E)).astype("f")
  shape = SHAPE if name in FAMILIES else SHALLOW
  model = mlp.MLP(shape, adapter)
  variables = randomised(model, Init(model, inputs))
  with jax.disable_jit():  # small operations, compiled once for all cases
    prediction = model.apply(variables, *inputs)
  trees = (reference.double(variables.get(key, {})) for key in ("params", "base", "frozen"))
  expected = reference.mlp(adapter, shape, *trees, *map(reference.double, inputs))
  compare(adapter, prediction.values, prediction.routing, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_decoder_follows_the_equations(name):
  adapter = config.AdapterConfig(**(COMMON | FAMILIES[name]))
  rng = np.random.default_rng(2)
  tokens = rng.integers(0, 17, (2, 5)).astype(np.int32)
  instruction = rng.normal(size=(2, E)).astype("f")
  shape = DECODER
  if name not in ("lora", "prior and query"):  # fewer maps compile and run faster
    shape = dataclasses.replace(DECODER, adapted=("q", "v", "o", "down"))
  model = decoder.Decoder(shape, adapter)
  init = Init(model, (tokens, None, None, jnp.asarray(instruction)))
  variables = randomised(model, init)
  with jax.disable_jit():
    output = model.apply(variables, *init.inputs)
  trees = (reference.double(variables.get(key, {})) for key in ("params", "base", "frozen"))
  expected = reference.decoder(adapter, shape, *trees, tokens, reference.double(instruction))
  compare(adapter, output.hidden, output.routing, expected)
