"""The decoder with its adapters: causality, packing, the cache, the scan, and frozen starts."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qlora_jax.adapters import config as adapter_config
from qlora_jax.adapters import sizing
from qlora_jax.models import attention, decoder, generation

CONFIG = decoder.DecoderConfig(
  vocabulary=61,
  width=16,
  hidden=24,
  layers=4,
  heads=4,
  groups=2,
  head_dim=8,
  layers_per_block=2,
  qk_norm=True,
  layer_windows=(0, 5, 0, 5),
)
E = 6
ADAPTERS = {
  "lora": {"family": "lora"},
  "dora": {"family": "dora"},
  "lily": {"family": "lily", "atoms": 3},
  "comol": {"family": "comol", "atoms": 3},
  "queryable": {},
  "queryable, output history": {"history": "output"},
  "queryable, top-k": {"top_k": 2},
  "queryable, recurrent": {"summary": "recurrent"},
  "queryable, an operator per map": {"operator": "map"},
  "queryable, instruction": {
    "instruction_dim": E,
    "instruction_in_query": True,
    "prior_weight": 1.0,
    "instruction_in_input": True,
  },
}
TOKENS = np.random.default_rng(0).integers(1, 61, (2, 12)).astype(np.int32)


@functools.cache
def build(name, config=CONFIG):
  """A model with random adapters; no factor is zero, so that every possible leak shows."""
  adapter = adapter_config.AdapterConfig(**({"rank": 4, "atoms": 5} | ADAPTERS[name]))
  model = decoder.Decoder(config, adapter)
  instruction = jnp.ones((1, E)) if adapter.instruction_dim else None
  variables = jax.jit(functools.partial(model.init, method="initialise"))(
    jax.random.key(0), TOKENS[:1], instruction
  )
  variables = jax.tree.map(
    lambda leaf: getattr(leaf, "value", leaf), variables, is_leaf=lambda x: hasattr(x, "names")
  )
  rng = np.random.default_rng(1)
  variables["params"] = jax.tree.map(
    lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype("f"), variables["params"]
  )
  return model, variables


def instruction_of(model, rows=2):
  if not model.adapter.instruction_dim:
    return None
  return np.random.default_rng(2).normal(size=(rows, E)).astype("f")


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_token_sees_a_later_one(name):
  model, variables = build(name)
  embedding = variables["base"]["embedding"]

  def score(inputs):
    # One row of the table per token: the gradient of a row is the gradient of that token.
    base = variables["base"] | {"embedding": inputs, "head": embedding.T}
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    config = dataclasses.replace(CONFIG, vocabulary=12)
    inner = decoder.Decoder(config, model.adapter)
    output = inner.apply(
      {**variables, "base": base}, tokens, instruction=instruction_of(model, rows=1)
    )
    return jnp.sum(jnp.sin(3 * output.hidden[0]), axis=-1)  # [T]

  gradients = np.abs(jax.jit(jax.jacrev(score))(embedding[TOKENS[0]])).sum(-1)  # [T, T]
  assert (gradients[np.triu_indices(12, 1)] == 0).all()
  assert (gradients[np.tril_indices(12)] > 0).all()


@pytest.mark.parametrize("name", ["lora", "queryable", "queryable, instruction"])
def test_packed_texts_equal_the_texts_alone(name):
  model, variables = build(name)
  instruction = instruction_of(model)
  packed = np.concatenate([TOKENS[0, :7], TOKENS[1, :4], [0, 0]])[None]
  positions = np.concatenate([np.arange(7), np.arange(4), [0, 0]])[None].astype(np.int32)
  segments = np.array([[1] * 7 + [2] * 4 + [attention.PADDING] * 2], np.int32)
  token_instruction = None
  if instruction is not None:
    token_instruction = instruction[np.array([0] * 7 + [1] * 4 + [0] * 2)][None]
  together = model.apply(
    variables, packed.astype(np.int32), positions, segments, token_instruction, method="score"
  )[0][0]
  for row, (first, length) in enumerate(((0, 7), (7, 4))):
    row_instruction = None if instruction is None else instruction[row : row + 1]
    alone, _ = model.apply(
      variables, TOKENS[row : row + 1, :length], instruction=row_instruction, method="score"
    )
    np.testing.assert_allclose(together[first : first + length], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_cached_and_uncached_logits_agree(name):
  model, variables = build(name)
  instruction = instruction_of(model)
  expected, _ = model.apply(variables, TOKENS, instruction=instruction, method="score")
  cache = attention.empty_cache(4, 2, 16, 2, 8, jnp.float32)
  actual = []
  for first, length in ((0, 5), (5, 1), (6, 1), (7, 5)):
    positions = np.broadcast_to(np.arange(first, first + length, dtype=np.int32), (2, length))
    scores, output = model.apply(
      variables,
      TOKENS[:, first : first + length],
      positions,
      None,
      instruction,
      cache,
      method="score",
    )
    cache = output.cache
    actual.append(scores)
  np.testing.assert_allclose(np.concatenate(actual, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_scan_and_remat_equal_an_unrolled_loop_in_values_and_gradients(remat):
  model, variables = build("queryable")
  unrolled = decoder.Decoder(dataclasses.replace(CONFIG, unroll=True), model.adapter)
  scanned = decoder.Decoder(dataclasses.replace(CONFIG, remat=remat), model.adapter)

  def loss(params, which):
    scores, _ = which.apply({**variables, "params": params}, TOKENS, method="score")
    return jnp.mean(jnp.square(scores))

  results = [
    jax.jit(jax.value_and_grad(functools.partial(loss, which=which)))(variables["params"])
    for which in (unrolled, scanned)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *results)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_adapted_model_starts_as_its_base(name):
  model, variables = build(name)
  fresh = jax.jit(functools.partial(model.init, method="initialise"))(
    jax.random.key(3), TOKENS[:1], None if instruction_of(model) is None else jnp.ones((1, E))
  )
  params = jax.tree.map(
    lambda leaf: getattr(leaf, "value", leaf),
    fresh["params"],
    is_leaf=lambda x: hasattr(x, "names"),
  )
  frozen = decoder.Decoder(CONFIG, adapter_config.AdapterConfig(family="none"))
  expected, _ = frozen.apply({"base": variables["base"]}, TOKENS, method="score")
  start, _ = model.apply(
    {**variables, "params": params}, TOKENS, instruction=instruction_of(model), method="score"
  )
  trained, _ = model.apply(variables, TOKENS, instruction=instruction_of(model), method="score")
  np.testing.assert_allclose(start, expected, rtol=1e-5, atol=1e-5)
  assert np.abs(trained - expected).max() > 0.01


@pytest.mark.parametrize("adapted", [decoder.MAPS, ("q", "v"), ("down",), ("up", "gate")])
@pytest.mark.parametrize("method", ["lora", "queryable", "lily"])
def test_parameters_are_those_of_the_formula_on_any_subset_of_maps(adapted, method):
  config = dataclasses.replace(CONFIG, adapted=adapted)
  adapter = adapter_config.AdapterConfig(family=method, rank=4, atoms=5)
  params = decoder.abstract(config, adapter)["params"]
  counted = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert counted == sizing.count(adapter, config.network())


def test_per_layer_windows_limit_what_a_layer_sees():
  config = dataclasses.replace(CONFIG, layer_windows=(3,) * 4, layers=1, layers_per_block=1)
  config = dataclasses.replace(config, layer_windows=(3,))
  model, variables = build("lora", config)
  changed = TOKENS.copy()
  changed[:, 4] = (changed[:, 4] + 1) % 60
  before, _ = model.apply(variables, TOKENS, method="score")
  after, _ = model.apply(variables, changed, method="score")
  differs = np.abs(before - after).max(axis=(0, 2)) > 0
  assert differs.tolist() == [False] * 4 + [True] * 3 + [False] * 5


def test_bfloat16_stays_near_float32():
  model, variables = build("queryable")
  half = decoder.Decoder(
    dataclasses.replace(CONFIG, dtype="bfloat16", base_dtype="bfloat16"), model.adapter
  )
  base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["base"])
  scores, output = half.apply({**variables, "base": base}, TOKENS, method="score")
  expected, _ = model.apply(variables, TOKENS, method="score")
  assert output.hidden.dtype == jnp.bfloat16 and scores.dtype == jnp.float32
  assert output.routing.weights.dtype == jnp.float32
  assert np.corrcoef(scores.ravel(), expected.ravel())[0, 1] > 0.99


def test_batched_generation_equals_each_prompt_alone_and_needs_no_more_state():
  model, variables = build("queryable")
  prompts = [[3, 4, 5, 6, 7, 8], [9], [10, 11, 12]]
  sampling = generation.SamplingConfig(max_tokens=8)
  together = generation.generate(model, variables, prompts, sampling=sampling)
  score = jax.jit(functools.partial(model.apply, method="score"))
  for prompt, expected in zip(prompts, together, strict=True):
    assert generation.generate(model, variables, [prompt], sampling=sampling) == [expected]
    tokens = np.zeros((1, 16), np.int32)  # the zeros have no effect: the model is causal
    tokens[0, : len(prompt)] = prompt
    for place, token in enumerate(expected, len(prompt)):  # without any cache
      scores, _ = score(variables, tokens)
      assert int(np.argmax(scores[0, place - 1])) == token
      tokens[0, place] = token


def test_generation_stops_at_a_stop_token():
  model, variables = build("lora")
  free = generation.generate(
    model, variables, [[3, 4, 5]], sampling=generation.SamplingConfig(max_tokens=8)
  )[0]
  stop = free[3]
  stopped = generation.generate(
    model, variables, [[3, 4, 5]], [stop], generation.SamplingConfig(max_tokens=8)
  )[0]
  assert stopped == free[: free.index(stop)]


def test_sampling_follows_the_distribution_and_top_p_cuts_its_tail():
  probabilities = np.array([0.5, 0.3, 0.15, 0.05])
  logits = jnp.broadcast_to(jnp.log(probabilities), (20_000, 4))
  key = jax.random.key(0)
  drawn = generation.choose(logits, generation.SamplingConfig(temperature=1.0), key)
  np.testing.assert_allclose(np.bincount(drawn) / 20_000, probabilities, atol=0.015)
  drawn = generation.choose(logits, generation.SamplingConfig(temperature=1.0, top_p=0.7), key)
  np.testing.assert_allclose(np.bincount(drawn) / 20_000, [0.625, 0.375], atol=0.015)
  sharp = np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365
  drawn = generation.choose(logits, generation.SamplingConfig(temperature=0.5), key)
  np.testing.assert_allclose(np.bincount(drawn) / 20_000, sharp, atol=0.015)
