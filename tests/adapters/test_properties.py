"""Properties of the method that hold for every input, and its equations against NumPy."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from qlora_jax import errors
from qlora_jax.adapters import config, factory, functional, sizing, statistics, summary
from qlora_jax.models import mlp
from qlora_jax.training import step
from qlora_jax.workloads import regression_config as settings

SHAPE = mlp.MLPConfig(inputs=5, width=16, hidden=12, layers=4, layers_per_block=1)
RNG = np.random.default_rng(0)
BATCH = step.Batch(
  RNG.normal(size=(6, 5)).astype("f"),
  RNG.normal(size=6).astype("f"),
  RNG.normal(size=(6, 3)).astype("f"),
)


VARIED = {
  "an operator a map": {"operator": "map"},
  "a memory a map": {"operator": "map", "memory": "map"},
}
NAMES = (*factory.names(), *VARIED)


def build(name, shape=SHAPE, **fields):
  fields = {"rank": 4, "atoms": 5, **fields}
  if name in VARIED:
    name, fields = "queryable_prior_query", {**fields, **VARIED[name]}
  adapter = factory.make(name, fields, settings.shapes(shape), budget=0, instruction_dim=3)
  base = settings.random_base(shape, 1)
  model = mlp.MLP(shape, adapter)
  params, frozen = step.init_params(model, base, jax.random.key(2), BATCH)
  return model, params, frozen


def randomise(params, seed=3):
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  draw = [
    leaf + 0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(tree, draw)


def predict(model, params, frozen):
  return model.apply(step.variables(model, params, frozen), BATCH.features, BATCH.instruction)


@pytest.mark.parametrize("name", NAMES)
def test_output_equals_the_frozen_base_at_initialisation(name):
  expected = predict(*build("none")).values
  actual = predict(*build(name)).values
  # DoRA divides by a norm equal to its numerator: one float32 rounding a layer.
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count_equals_the_closed_formula(name):
  model, params, _ = build(name)
  counted = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert sizing.count(model.adapter, settings.shapes(SHAPE)) == counted


@pytest.mark.parametrize("kind", summary.KINDS)
def test_scan_over_blocks_equals_an_unrolled_loop_in_values_and_gradients(kind):
  model, params, frozen = build("queryable_prior_query", summary=kind, top_k=2)
  params = randomise(params)
  unrolled = mlp.MLP(mlp.dataclasses.replace(SHAPE, unroll=True), model.adapter)

  def value_and_grad(network):
    return jax.jit(jax.value_and_grad(lambda p: step.loss_fn(p, frozen, BATCH, network)[0]))(params)

  scanned, looped = value_and_grad(model), value_and_grad(unrolled)
  # The same float32 operations, fused differently.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), scanned, looped)


@pytest.mark.parametrize("block", range(4))
def test_the_one_memory_receives_gradient_from_every_block(block):
  model, params, frozen = build("queryable")
  params = randomise(params)
  only = np.zeros((4, 1, 1), "f")
  only[block] = 1.0
  layer = params["stack"]["blocks"]["layer_0"]
  for name in mlp.MAPS:
    layer[name]["branch"]["lora_b"] = layer[name]["branch"]["lora_b"] * only
  grads = jax.grad(lambda p: step.loss_fn(p, frozen, BATCH, model)[0])(params)
  assert np.abs(grads["stack"]["memory"]["atoms"]).max() > 1e-6


def test_a_step_changes_the_adapter_and_leaves_the_base():
  model, params, frozen = build("queryable")
  before = jax.device_get(frozen.base)
  tx = step.optax.sgd(-1.0)
  state = step.TrainState(np.int32(0), params, tx.init(params), np.float32(1e-2))
  after, _ = jax.jit(step.train_step, static_argnums=(3, 4))(state, frozen, BATCH, model, tx)
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(frozen.base))
  lora_b = after.params["stack"]["blocks"]["layer_0"]["up"]["branch"]["lora_b"]
  assert np.abs(lora_b).max() > 0
  assert "base" not in after.params


@pytest.mark.parametrize(
  "name", ["lora", "rslora", "queryable", "queryable_topk", "an operator a map", "static"]
)
def test_the_measured_norm_never_exceeds_the_certified_bound(name):
  model, params, frozen = build(name)
  for seed in range(5):
    drawn = randomise(params, seed)
    weights = predict(model, drawn, frozen).routing.weights
    norms = statistics.update_norms(model.adapter, drawn, weights, mlp.MAPS)
    assert norms["slack"] >= -1e-4 * norms["certified"]
    assert norms["measured"] > 0


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
  logits=st.lists(st.sampled_from([-3.0, 0.0, 0.0, 1.0, 1.0, 40.0]), min_size=1, max_size=9),
  k=st.integers(1, 9),
  equal=st.booleans(),
)
def test_weights_are_a_convex_combination_with_at_most_k_atoms(logits, k, equal):
  k = min(k, len(logits))
  weights = np.asarray(functional.sparse_weights(np.array(logits, "f"), k, equal))
  assert (weights >= -1e-7).all() and np.isclose(weights.sum(), 1.0, atol=1e-5)
  assert (weights > 0).sum() <= k
  order = np.argsort(-np.array(logits), kind="stable")[:k]
  reference = np.zeros(len(logits))
  exponent = np.exp(np.array(logits)[order] - max(logits))
  reference[order] = 1 / k if equal else exponent / exponent.sum()
  np.testing.assert_allclose(weights, reference, atol=1e-5)


@pytest.mark.parametrize(("num_atoms", "k"), [(5, 2), (70, 3)])
def test_the_top_k_mask_keeps_the_lowest_index_among_ties(num_atoms, k):
  mask = np.asarray(functional.top_k_mask(np.zeros(num_atoms, "f"), k))
  np.testing.assert_array_equal(mask, np.arange(num_atoms) < k)


def norm64(x):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)


def test_low_rank_state_query_prior_and_logits_follow_their_equations():
  draw = RNG.normal
  x, a, s, e = draw(size=(6, 7)), draw(size=(7, 4)), draw(size=(6, 4)), draw(size=(6, 3))
  wz, ws, we, c = draw(size=(4, 8)), draw(size=(4, 8)), draw(size=(3, 8)), draw(size=8)
  keys, nu, p = draw(size=(5, 8)), draw(size=(5, 2)), draw(size=(3, 2))
  z = norm64(x @ a)
  q = z @ wz + s @ ws + e @ we + c
  scores = e @ p @ nu.T / 0.7
  log_prior = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
  logits = q @ keys.T / np.sqrt(8) + 0.5 * log_prior
  f = [v.astype("f") for v in (x, a, s, e, wz, ws, we, c, keys, nu, p)]
  state = functional.low_rank_state(f[0], f[1])
  query = functional.query(state, f[2], f[3], f[4], f[5], f[6], f[7])
  prior = functional.log_language_prior(f[3], f[10], f[9], 0.7)
  actual = jax.jit(functional.router_logits, static_argnums=3)(query, f[8], prior, 0.5)
  # float32 against float64 over products of at most 8 terms of order one.
  for got, expected in ((state, z), (query, q), (prior, log_prior), (actual, logits)):
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("index", range(4))
def test_depth_attention_follows_its_equation_and_starts_at_zero(index):
  history, p = RNG.normal(size=(4, 6, 3)), RNG.normal(size=3)  # blocks first
  expected = np.zeros((6, 3))
  if index:
    scores = np.exp(norm64(history[:index]) @ p)
    attention = scores / scores.sum(0)
    expected = np.einsum("nb,nbr->br", attention, history[:index])
  actual = summary.depth_attention(history.astype("f"), p.astype("f"), index)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_recurrent_summary_is_a_gated_mean():
  s, h, a = RNG.normal(size=(6, 3)), RNG.normal(size=(6, 3)), RNG.normal(size=3)
  keep = 1 / (1 + np.exp(-a))
  actual = summary.gated_update(s.astype("f"), h.astype("f"), a.astype("f"))
  np.testing.assert_allclose(actual, keep * s + (1 - keep) * h, rtol=1e-5, atol=1e-5)


def test_all_orders_of_contraction_give_the_routed_operator():
  z, u, b = RNG.normal(size=(6, 4)), RNG.normal(size=(5, 4, 4)), RNG.normal(size=(4, 7))
  logits = RNG.normal(size=(6, 5)).astype("f")
  w = np.asarray(functional.sparse_weights(logits, 2), np.float64)
  expected = 0.5 * np.einsum("br,bm,mrs,sd->bd", z, w, u, b)
  zf, uf, bf, wf = (v.astype("f") for v in (z, u, b, w))
  for mixed in (
    functional.apply_operator(zf, functional.routed_operator(wf, uf)),
    functional.apply_atoms(zf, wf, uf),
    functional.gather_atoms(zf, wf, uf, 2),
  ):
    actual = functional.low_rank_output(mixed, bf, 0.5)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ("layers", "per_block", "atoms", "top_k"), [(4, 4, 5, 0), (1, 1, 1, 1), (4, 2, 3, 3)]
)
def test_edge_shapes_work(layers, per_block, atoms, top_k):
  shape = mlp.dataclasses.replace(SHAPE, layers=layers, layers_per_block=per_block)
  values = predict(*build("queryable", shape, atoms=atoms, top_k=top_k)).values
  assert np.isfinite(values).all()


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"top_k": 9, "atoms": 4}, "adapter.top_k"),
    ({"rank": 0}, "adapter.rank"),
    ({"family": "nope"}, "adapter.family"),
    ({"prior_weight": 1.0}, "adapter.instruction_dim"),
  ],
)
def test_a_mistake_names_its_field(fields, named):
  with pytest.raises(errors.UserError, match=named):
    config.AdapterConfig(**fields)


@pytest.mark.parametrize(("silent", "other"), [("up", "down"), ("down", "up")])
def test_a_memory_a_map_gives_each_map_atoms_of_its_own(silent, other):
  model, params, frozen = build("a memory a map")
  params = randomise(params)
  layer = params["stack"]["blocks"]["layer_0"]
  layer[silent] = jax.tree.map(np.zeros_like, layer[silent])
  memory = params["stack"]["memory"]

  def with_more(name):
    more = {**memory, f"atoms_{name}": memory[f"atoms_{name}"] + 1.0}
    stack = {**params["stack"], "memory": more}
    return predict(model, {**params, "stack": stack}, frozen).values

  before = predict(model, params, frozen).values
  np.testing.assert_array_equal(with_more(silent), before)
  assert np.abs(with_more(other) - before).max() > 1e-3


def test_the_temperature_divides_the_logits():
  model, params, frozen = build("queryable_prior_query")
  warm = mlp.MLP(SHAPE, mlp.dataclasses.replace(model.adapter, temperature=4.0))
  params = randomise(params)
  cold = predict(model, params, frozen).routing.logits[0]  # later blocks see another state
  np.testing.assert_allclose(
    predict(warm, params, frozen).routing.logits[0], cold / 4, rtol=1e-5, atol=1e-6
  )
