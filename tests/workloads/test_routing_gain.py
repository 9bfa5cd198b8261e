"""What the routing gains: the three replacements, sums over batches, and who exchanges weights."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import strategies as st

from qlora_jax.adapters import factory, rerouting
from qlora_jax.models import mlp
from qlora_jax.workloads import regression_config as settings
from qlora_jax.workloads import routing_gain as routing

SHAPE = mlp.MLPConfig(inputs=5, width=8, hidden=8, layers=2, layers_per_block=1)
RNG = np.random.default_rng(0)
FEATURES, TARGETS, INSTRUCTION = (RNG.normal(size=s).astype("f") for s in ((8, 5), (8,), (8, 3)))


@functools.cache
def network(name):
  """A model, its variables before training and after: both drawn at random."""
  fields = {"rank": 4, "atoms": 5}
  adapter = factory.make(name, fields, settings.shapes(SHAPE), budget=0, instruction_dim=3)
  model = mlp.MLP(SHAPE, adapter)
  shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), FEATURES, INSTRUCTION))
  rng = np.random.default_rng(1)
  drawn = [jax.tree.map(lambda leaf: rng.normal(0, 0.7, leaf.shape), shapes) for _ in range(2)]
  initial, trained = (jax.tree.map(lambda leaf: leaf.astype("f"), tree) for tree in drawn)
  return model, initial, {**trained, "base": initial["base"]}


def probe(name, rows, mask=None):
  model, initial, trained = network(name)

  @jax.jit
  def run(features, targets, instruction, other, mask):
    def loss(output):
      return jax.numpy.sum(jax.numpy.square(output.values - targets))

    probed = routing.probe(
      model, trained, initial, loss, other, mask, float(len(targets)), features, instruction
    )
    mixtures = routing.one_mixture(model, trained, loss, probed.mean_weights, features, instruction)
    return probed, mixtures

  mask = np.ones(len(TARGETS[rows]), "f") if mask is None else mask
  other = routing.other_rows(len(mask)) if len(mask) > 1 else np.zeros(1, np.int32)
  return jax.device_get(run(FEATURES[rows], TARGETS[rows], INSTRUCTION[rows], other, mask))


def errors_with(name, weights):
  model, _, trained = network(name)

  @jax.jit
  def values(weights):
    return rerouting.with_weights(model, trained, weights, FEATURES, INSTRUCTION).values

  return np.square(values(weights) - TARGETS)


def test_each_gain_is_the_error_with_its_replacement_less_that_as_trained():
  model, initial, trained = network("queryable_query")
  probed, mixtures = probe("queryable_query", slice(None))
  row = routing.columns(probed, *mixtures, rerouting.movement(initial["params"], trained["params"]))
  apply = jax.jit(model.apply)
  as_trained = apply(trained, FEATURES, INSTRUCTION)
  weights, error = as_trained.routing.weights, np.square(as_trained.values - TARGETS).mean()
  drawn = apply(initial, FEATURES, INSTRUCTION).routing.weights
  expected = {
    "mean": weights.mean(axis=2),
    "uniform": np.full((*weights.shape[:2], 5), 0.2, "f"),
    "other": weights[:, :, routing.other_rows(8)],
  }
  for name, replacement in expected.items():
    gain = errors_with("queryable_query", replacement).mean() - error
    np.testing.assert_allclose(row[f"routing/gain_{name}"], gain, rtol=1e-3, atol=1e-5)
    assert abs(gain) > 1e-3
  distance = 0.5 * np.abs(weights - drawn).sum(axis=-1).mean()
  np.testing.assert_allclose(row["routing/moved_weights"], distance, rtol=1e-5)
  support = (1 / np.square(drawn).sum(axis=-1)).mean()
  np.testing.assert_allclose(row["routing/support_start"], support, rtol=1e-5)
  assert set(row) == set(routing.COLUMNS)


def test_one_learned_mixture_gains_nothing_over_its_mean_or_over_other_rows():
  probed, mixtures = probe("static", slice(None))
  moved = {"keys": np.nan, "atoms": 0.0, "router": np.nan}
  row = routing.columns(probed, *mixtures, moved)
  assert abs(row["routing/gain_mean"]) < 1e-5 and abs(row["routing/gain_other"]) < 1e-5
  assert abs(row["routing/gain_uniform"]) > 1e-3


def test_sums_over_batches_are_those_of_one_batch_and_a_lone_row_exchanges_nothing():
  whole, _ = probe("queryable_query", slice(None))
  parts = [probe("queryable_query", rows)[0] for rows in (slice(0, 7), slice(7, 8))]
  total = routing.merge(parts)
  for name in ("trained", "answers", "weights", "moved", "support", "tokens"):
    np.testing.assert_allclose(getattr(total, name), getattr(whole, name), rtol=1e-4, err_msg=name)
  assert parts[1].exchanged == 0 and parts[1].other == 0 and total.exchanged == 7
  alone = routing.columns(parts[1], 1.0, 1.0, {"keys": 0.0, "atoms": 0.0, "router": 0.0})
  assert np.isnan(alone["routing/gain_other"])


def test_masked_tokens_count_in_no_mean():
  mask = np.array([1, 1, 1, 0, 0, 0, 0, 0], "f")
  masked, _ = probe("queryable_query", slice(None), mask)
  first, _ = probe("queryable_query", slice(0, 3))
  for name in ("weights", "moved", "support", "tokens"):
    np.testing.assert_allclose(getattr(masked, name), getattr(first, name), rtol=1e-4)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_no_row_keeps_its_own_weights(count):
  other = routing.other_rows(count)
  assert sorted(other) == list(range(count)) and (other != np.arange(count)).all()


def test_one_row_has_no_other():
  with pytest.raises(ValueError, match="one row"):
    routing.other_rows(1)


@hypothesis.given(
  rows=st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=3), min_size=1, max_size=3
  )
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_examples_exchange_prompt_for_prompt_and_answer_for_answer(rows):
  """Every token of an example gets weights of one other example, of the same part."""
  length = 24
  segments, answers = np.zeros((len(rows), length), int), np.zeros((len(rows), length))
  parts = {}  # example -> (prompt places, answer places)
  for row, examples in enumerate(rows):
    start = 0
    for segment, (prompt, answer) in enumerate(examples, start=1):
      end = start + prompt + answer
      segments[row, start:end], answers[row, start + prompt : end] = segment, 1
      places = row * length + np.arange(start, end)
      if len(places):
        parts[row, segment] = (places[:prompt], places[prompt:])
      start = end
  source = routing.other_examples(segments, answers).ravel()
  owner = {place: key for key, pair in parts.items() for place in np.concatenate(pair)}
  for place in np.flatnonzero(segments.ravel() == 0):
    assert source[place] == place  # padding
  if len(parts) < 2:
    assert (source == np.arange(source.size)).all()
    return
  for key, pair in parts.items():
    givers = {owner[source[place]] for place in np.concatenate(pair)}
    assert len(givers) == 1 and givers != {key}
    given_parts = parts[givers.pop()]
    for part, places in enumerate(pair):
      expected = given_parts[part] if len(given_parts[part]) else np.concatenate(given_parts)
      wanted = expected[np.minimum(np.arange(len(places)), len(expected) - 1)]
      np.testing.assert_array_equal(source[places], wanted)
  used = {owner[source[place]] for pair in parts.values() for place in np.concatenate(pair)}
  assert used == set(parts)  # one cycle: everyone gives
