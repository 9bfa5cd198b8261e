"""Every equation of the method against an independent NumPy reference in float64."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qlora_jax.adapters import functional, summary

LEADING = [(), (3,), (2, 4)]
# float32 against float64 over sums of at most a few dozen terms of order one.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def draw(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def tokens(array, trailing):
  """[.., *trailing] as [tokens, *trailing] in float64."""
  return np.asarray(array, np.float64).reshape(-1, *array.shape[array.ndim - trailing :])


def check(actual, expected):
  np.testing.assert_allclose(tokens(np.asarray(actual), expected.ndim - 1), expected, **CLOSE)


def softmax(x):
  weights = np.exp(x - np.max(x))
  return weights / weights.sum()


def normalised(x):
  return x / np.sqrt(np.mean(x**2) + functional.RMS_EPSILON)


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("compiled", [False, True])
def test_low_rank_state_is_the_normalised_product(leading, compiled):
  x, lora_a = draw(*leading, 7), draw(7, 3)
  function = jax.jit(functional.low_rank_state) if compiled else functional.low_rank_state
  a = lora_a.astype(np.float64)
  check(function(x, lora_a), np.stack([normalised(row @ a) for row in tokens(x, 1)]))


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("index", range(5))
def test_depth_attention_reads_only_the_blocks_before(leading, index):
  history, pseudo_query = draw(4, *leading, 3), draw(3)
  actual = jax.jit(summary.depth_attention)(history, pseudo_query, index)
  states = np.stack([tokens(block, 1) for block in history])  # [N, tokens, R]
  expected = np.zeros(states.shape[1:])
  for token in range(states.shape[1]):
    if index:
      before = states[:index, token]
      scores = np.array([pseudo_query.astype(np.float64) @ normalised(h) for h in before])
      expected[token] = softmax(scores) @ before
  check(actual, expected)


def test_depth_attention_with_a_zero_query_is_the_mean():
  history = draw(4, 5, 3)
  actual = summary.depth_attention(history, np.zeros(3, np.float32), 3)
  np.testing.assert_allclose(actual, history[:3].mean(0), **CLOSE)


def test_recurrent_summary_follows_its_recursion():
  gate, states = draw(3), draw(5, 2, 3)
  carry = summary.initial("recurrent", (2,), 5, 3)
  expected, keep = np.zeros((2, 3)), 1 / (1 + np.exp(-gate.astype(np.float64)))
  for index, state in enumerate(states):
    carry = summary.write("recurrent", carry, state, index, gate)
    expected = keep * expected + (1 - keep) * state
  np.testing.assert_allclose(summary.read("recurrent", carry, 5, None), expected, **CLOSE)


def test_no_summary_carries_and_reads_nothing():
  carry = summary.initial("none", (2,), 5, 3)
  assert carry.size == 0
  assert summary.read("none", summary.write("none", carry, draw(2, 3), 0, None), 1, None) is None


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("term", ["state", "summary", "instruction", "bias", "all"])
def test_query_sums_the_terms_that_have_kernels(leading, term):
  state, running, instruction = draw(*leading, 3), draw(*leading, 3, seed=1), draw(*leading, 5)
  kernels = {
    "state": draw(3, 4),
    "summary": draw(3, 4, seed=2),
    "instruction": draw(5, 4),
    "bias": draw(4),
  }
  used = {k: v if term in (k, "all") else None for k, v in kernels.items()}
  actual = functional.query(state, running, instruction, *used.values())
  expected = np.zeros((len(tokens(state, 1)), 4))
  for name, values in (("state", state), ("summary", running), ("instruction", instruction)):
    if used[name] is not None:
      expected += tokens(values, 1) @ used[name].astype(np.float64)
  if used["bias"] is not None:
    expected += used["bias"]
  check(actual, expected)


def test_a_query_without_terms_is_refused():
  with pytest.raises(ValueError, match="at least one"):
    functional.query(draw(2, 3), None, None, None, None, None, None)


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("projected", [False, True])
def test_language_prior_is_a_log_softmax_over_descriptors(leading, projected):
  instruction, projection = draw(*leading, 5), draw(5, 4)
  descriptors = draw(6, 4 if projected else 5)
  actual = functional.log_language_prior(
    instruction, projection if projected else None, descriptors, 0.7
  )
  expected = []
  for row in tokens(instruction, 1):
    row = row @ projection if projected else row
    expected.append(np.log(softmax(descriptors.astype(np.float64) @ row / 0.7)))
  check(actual, np.stack(expected))


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_router_logits_scale_by_the_root_of_the_query_width(leading, weight):
  query, keys, prior = draw(*leading, 4), draw(6, 4), draw(*leading, 6)
  actual = functional.router_logits(query, keys, prior, weight)
  expected = tokens(query, 1) @ keys.astype(np.float64).T / 2.0 + weight * tokens(prior, 1)
  check(actual, expected)


def reference_weights(logits, k):
  order = sorted(range(len(logits)), key=lambda m: (-logits[m], m))  # ties: the lowest index
  winners = sorted(order[:k])
  weights = np.zeros(len(logits))
  weights[winners] = softmax(np.asarray(logits)[winners])
  return weights


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize(("atoms", "k"), [(1, 1), (6, 1), (6, 3), (6, 6), (65, 4), (65, 65)])
def test_sparse_weights_are_the_softmax_over_the_k_largest(leading, atoms, k):
  logits = draw(*leading, atoms)
  actual = jax.jit(functional.sparse_weights, static_argnums=(1, 2))(logits, k)
  check(actual, np.stack([reference_weights(row, k) for row in tokens(logits, 1)]))


@pytest.mark.parametrize("atoms", [6, 70])
def test_ties_keep_exactly_k_atoms_and_the_lowest_win(atoms):
  logits = np.zeros((2, atoms), np.float32)
  logits[1, -1] = 1.0
  mask = np.asarray(functional.top_k_mask(logits, 3))
  np.testing.assert_array_equal(mask[0], np.arange(atoms) < 3)
  np.testing.assert_array_equal(np.flatnonzero(mask[1]), [0, 1, atoms - 1])


def test_equal_weights_are_one_kth_with_the_gradient_of_the_softmax():
  logits, direction = draw(4, 6), draw(4, 6, seed=1)

  def total(logits, equal):
    return jnp.sum(functional.sparse_weights(logits, 3, equal) * direction)

  weights = np.asarray(functional.sparse_weights(logits, 3, True))
  np.testing.assert_allclose(np.sort(weights, -1)[:, 3:], 1 / 3, rtol=1e-6)
  np.testing.assert_allclose(np.sort(weights, -1)[:, :3], 0, atol=1e-7)
  np.testing.assert_allclose(jax.grad(total)(logits, True), jax.grad(total)(logits, False), **CLOSE)


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("columns", [3, 5])
def test_routed_operator_and_output_follow_the_sums(leading, columns):
  weights = np.abs(draw(*leading, 4))
  atoms, low_rank, lora_b = draw(4, 3, columns), draw(*leading, 3), draw(columns, 6)
  operator = functional.routed_operator(weights, atoms)
  expected = np.stack(
    [
      sum(w * atom for w, atom in zip(row, atoms.astype(np.float64), strict=True))
      for row in tokens(weights, 1)
    ]
  )
  check(operator, expected)
  mixed = np.stack([z @ c for z, c in zip(tokens(low_rank, 1), expected, strict=True)])
  for actual in (
    functional.apply_operator(low_rank, operator),
    functional.apply_atoms(low_rank, weights, atoms),
    functional.gather_atoms(low_rank, weights, atoms, 4),
  ):
    check(actual, mixed)
  check(
    functional.low_rank_output(mixed.reshape(*leading, -1).astype("f"), lora_b, 0.5),
    0.5 * mixed @ lora_b.astype(np.float64),
  )


def test_the_three_orders_of_contraction_have_the_same_gradients():
  weights, atoms, low_rank = np.abs(draw(5, 4)), draw(4, 3, 3), draw(5, 3)
  functions = (
    lambda z, w, u: functional.apply_operator(z, functional.routed_operator(w, u)),
    functional.apply_atoms,
    lambda z, w, u: functional.gather_atoms(z, w, u, 4),
  )
  direction = draw(5, 3, seed=1)
  first, *others = [
    jax.grad(lambda *a, f=f: jnp.sum(direction * f(*a)), (0, 1, 2))(low_rank, weights, atoms)
    for f in functions
  ]
  for other in others:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), first, other)


def test_the_operator_is_applied_alike_on_a_cpu_and_elsewhere():
  low_rank, operator = draw(5, 3), draw(5, 3, 4)
  here, elsewhere = functional._apply_expanded, functional._apply_batched
  np.testing.assert_allclose(here(low_rank, operator), elsewhere(low_rank, operator), **CLOSE)


def test_one_operator_for_all_tokens_broadcasts():
  low_rank, operator = draw(2, 5, 3), draw(3, 4)
  expected = low_rank.astype(np.float64) @ operator
  np.testing.assert_allclose(functional.apply_operator(low_rank, operator), expected, **CLOSE)
