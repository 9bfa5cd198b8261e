"""Statistics against hand computations, simulations and independent NumPy."""

import itertools
import math
import warnings

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from qlora_jax.studies import spread, statistics

_VALUES = st.floats(-1e3, 1e3, allow_nan=False)
_SAMPLES = st.lists(_VALUES, min_size=2, max_size=12)
_PAIRS = st.lists(st.tuples(_VALUES, _VALUES), min_size=2, max_size=9)
_FEW = hypothesis.settings(max_examples=30, deadline=None)


# Bootstrap


def test_paired_bootstrap_covers_the_true_difference():
  rng = np.random.default_rng(0)
  hits = 0
  for trial in range(200):
    seeds = rng.normal(size=20)  # shared by both methods: pairing removes it
    a = seeds + rng.normal(0.3, 0.2, size=20)
    b = seeds + rng.normal(0.0, 0.2, size=20)
    interval = statistics.paired_bootstrap(a, b, num_resamples=500, seed=trial)
    hits += interval.low <= 0.3 <= interval.high
    assert interval.high - interval.low < 0.5  # unpaired: about 1.2
  assert 0.87 <= hits / 200 <= 0.99  # nominal .95, some .93 at n = 20, binomial error .018


def test_bootstrap_matches_numpy_resampling():
  a, b = np.random.default_rng(1).normal(size=(2, 15))
  indices = np.random.default_rng(2).integers(0, 15, (20_000, 15))
  low, high = np.percentile((a - b)[indices].mean(axis=1), [2.5, 97.5])
  interval = statistics.paired_bootstrap(a, b)
  assert interval.mean == pytest.approx(np.mean(a - b))
  # Two Monte-Carlo quantiles of a distribution about 1.6 wide: errors of some .02.
  np.testing.assert_allclose(interval[1:], [low, high], atol=0.05)
  assert statistics.bootstrap_mean(a - b) == pytest.approx(interval, abs=1e-12)


def test_relative_bootstrap_matches_numpy_resampling():
  rng = np.random.default_rng(3)
  b = rng.uniform(1, 2, 12)
  a = 0.9 * b + rng.normal(0, 0.05, 12)
  indices = rng.integers(0, 12, (20_000, 12))
  means_a, means_b = a[indices].mean(axis=1), b[indices].mean(axis=1)
  expected = np.percentile(100 * (means_a - means_b) / means_b, [2.5, 97.5])
  interval = statistics.paired_bootstrap_relative(a, b)
  assert interval.mean == pytest.approx(100 * (a.mean() - b.mean()) / b.mean())
  np.testing.assert_allclose(interval[1:], expected, atol=0.15)


@_FEW
@hypothesis.given(_SAMPLES, st.integers(0, 100))
def test_interval_holds_the_mean_and_stays_in_the_range(values, seed):
  interval = statistics.bootstrap_mean(values, num_resamples=200, seed=seed)
  slack = 1e-9 * (1 + max(map(abs, values)))
  assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack
  assert interval.mean == pytest.approx(np.mean(values))


@_FEW
@hypothesis.given(_PAIRS)
def test_swapping_the_methods_mirrors_the_interval(pairs):
  a, b = np.array(pairs).T
  forward = statistics.paired_bootstrap(a, b, num_resamples=200)
  backward = statistics.paired_bootstrap(b, a, num_resamples=200)
  expected = (-backward.mean, -backward.high, -backward.low)
  assert tuple(forward) == pytest.approx(expected, abs=1e-6)


def test_same_seed_same_interval_and_higher_confidence_is_wider():
  a = np.random.default_rng(4).normal(size=10)
  assert statistics.bootstrap_mean(a, seed=1) == statistics.bootstrap_mean(a, seed=1)
  narrow, wide = (statistics.bootstrap_mean(a, confidence=c) for c in (0.5, 0.99))
  assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
  "function", [statistics.paired_bootstrap, statistics.paired_bootstrap_relative]
)
def test_equal_differences_give_a_point_without_warnings(function):
  b = np.array([0.1, 0.2, 0.7])
  a = 1.1 * b if function is statistics.paired_bootstrap_relative else b + 0.3
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    interval = function(a, b)
  assert interval.low == interval.mean == interval.high
  assert function(b, b) == (0, 0, 0)


# Few seeds


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_of_few_seeds_hold_the_truth_as_often_as_they_say(n):
  rng, hits = np.random.default_rng(6), np.zeros(4)
  for _ in range(400):
    b = 1.0 + rng.normal(0.0, 0.1, size=n)
    a = 0.9 * b + rng.normal(0.0, 0.05, size=n)
    for place, (interval, truth) in enumerate(
      (
        (statistics.mean_interval(b), 1.0),
        (statistics.paired_interval(a, b), -0.1),
        (statistics.paired_relative_interval(a, b), -10.0),
        (statistics.bootstrap_mean(b), 1.0),
      )
    ):
      hits[place] += interval.low <= truth <= interval.high
  shares = hits / 400  # nominal .95, binomial error .011
  assert (shares[:3] > 0.91).all() and (shares[:3] < 0.985).all()
  assert shares[3] < 0.88  # why the bootstrap is not used here


def test_many_seeds_are_resampled():
  a, b = np.random.default_rng(7).uniform(1, 2, size=(2, statistics.FEW))
  assert statistics.mean_interval(a) == statistics.bootstrap_mean(a)
  assert statistics.paired_interval(a, b) == statistics.paired_bootstrap(a, b)
  assert statistics.paired_relative_interval(a, b) == statistics.paired_bootstrap_relative(a, b)
  assert statistics.paired_test(a, b) == statistics.paired_p_value(a, b)


def test_few_seeds_are_students():
  a, b = np.array([0.8, 0.9, 1.3]), np.array([1.0, 1.2, 1.4])
  low, high = stats.t.interval(0.95, 2, np.mean(a - b), stats.sem(a - b))
  assert statistics.paired_interval(a, b) == pytest.approx((np.mean(a - b), low, high))
  assert statistics.paired_test(a, b) == pytest.approx(stats.ttest_rel(a, b).pvalue)


def test_a_relative_interval_of_few_seeds_is_about_fiellers():
  a, b = np.array([0.88, 0.91, 0.93, 0.9]), np.array([1.0, 1.02, 0.99, 1.01])
  # Fieller: the ratios r for which mean(a - r b) is not told apart from zero.
  quantile = stats.t.ppf(0.975, 3) ** 2 / 4
  (aa, ab), (_, bb) = quantile * np.cov(a, b)
  roots = np.roots([b.mean() ** 2 - bb, -2 * (a.mean() * b.mean() - ab), a.mean() ** 2 - aa])
  low, high = 100 * (np.sort(roots) - 1)
  relative = statistics.paired_relative_interval(a, b)
  assert relative.mean == pytest.approx(100 * (a.mean() / b.mean() - 1))
  # They part by terms of second order in the baseline's scatter, here some hundredths.
  assert (relative.low, relative.high) == pytest.approx((low, high), abs=0.02 * (high - low))


def test_few_equal_differences_are_a_point_and_wrong_input_is_told():
  b = np.array([0.1, 0.2, 0.7])
  assert statistics.paired_interval(b + 0.3, b) == pytest.approx((0.3, 0.3, 0.3))
  assert statistics.paired_relative_interval(1.1 * b, b) == pytest.approx((10, 10, 10))
  assert statistics.paired_test(b, b) == 1.0
  with pytest.raises(ValueError, match="positive"):
    statistics.paired_relative_interval(b, -b)
  with pytest.raises(ValueError, match="pair up"):
    statistics.paired_interval(b, b[:2])


# Tests and effect sizes


def test_p_value_enumerates_every_sign_flip():
  a = np.array([0.5, 0.9, -0.1, 0.4, 0.3, 0.2])
  flips = np.array(list(itertools.product([-1, 1], repeat=6)))
  means = (flips * a).mean(axis=1)
  expected = np.mean(np.abs(means) >= abs(a.mean()) - 1e-12)
  assert statistics.paired_p_value(a, np.zeros(6)) == pytest.approx(expected)


@pytest.mark.parametrize("n", [2, 5, 6, 10])
def test_smallest_p_value_is_two_over_two_to_the_n(n):
  assert statistics.paired_p_value(np.arange(1.0, n + 1), np.zeros(n)) == pytest.approx(2 / 2**n)


def test_p_value_is_uniform_enough_without_a_difference():
  rng = np.random.default_rng(5)
  p = [statistics.paired_p_value(rng.normal(size=8), np.zeros(8)) for _ in range(200)]
  assert np.mean(np.array(p) <= 0.05) <= 0.1  # binomial error .015


def test_many_pairs_are_sampled_close_to_the_t_test():
  rng = np.random.default_rng(6)
  a, b = rng.normal(0.4, 1, 30), rng.normal(0, 1, 30)
  assert statistics.paired_p_value(a, b) == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)


def test_equal_methods_have_p_value_one_and_no_effect():
  a = [0.3, 0.1, 0.2]
  assert statistics.paired_p_value(a, a) == 1
  assert statistics.effect_size(a, a) == 0
  assert statistics.effect_size(np.add(a, 0.1), a) == math.inf
  assert statistics.effect_size(np.subtract(a, 0.1), a) == -math.inf


def test_effect_size_is_mean_over_deviation_of_differences():
  a, b = [3.0, 5.0, 9.0], [1.0, 2.0, 5.0]  # differences 2, 3, 4
  assert statistics.effect_size(a, b) == pytest.approx(3.0)
  assert spread.standard_deviation([2.0, 3.0, 4.0]) == pytest.approx(1.0)


def test_student_matches_the_example_by_hand_and_covers_with_three_seeds():
  # Mean 2, standard error 1 / sqrt(3), t_(0.975, 2) = 4.303.
  interval, p_value = statistics.student([1.0, 2.0, 3.0])
  half = 4.302653 / math.sqrt(3)
  assert interval == pytest.approx((2.0, 2.0 - half, 2.0 + half), rel=1e-6)
  assert p_value == pytest.approx(0.0741799, rel=1e-5)
  assert statistics.student([2.0, 2.0]) == ((2.0, 2.0, 2.0), 0.0)
  assert statistics.student([0.0, 0.0])[1] == 1.0
  rng = np.random.default_rng(0)
  held = [
    interval.low <= 1 <= interval.high
    for interval, _ in (statistics.student(rng.normal(1, 2, size=3)) for _ in range(2000))
  ]
  assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_holm_matches_the_example_by_hand():
  # Sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04; the last is raised to .06.
  np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


@_FEW
@hypothesis.given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms())
def test_holm_is_monotone_between_raw_and_bonferroni_and_ignores_order(p, random):
  adjusted = statistics.holm(p)
  assert (adjusted >= p).all()
  assert (adjusted <= np.minimum(1, len(p) * np.array(p))).all()
  assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()
  shuffle = random.sample(range(len(p)), len(p))
  np.testing.assert_array_equal(statistics.holm(np.array(p)[shuffle]), adjusted[shuffle])


# Bad input


@pytest.mark.parametrize(
  "function",
  [
    statistics.paired_bootstrap,
    statistics.paired_bootstrap_relative,
    statistics.paired_p_value,
    statistics.effect_size,
  ],
)
@pytest.mark.parametrize(
  ("a", "b"),
  [
    ([], []),
    ([1.0], [1.0]),
    ([1.0, 2.0], [1.0, 2.0, 3.0]),
    ([1.0, np.nan], [1.0, 2.0]),
    ([1.0, 2.0], [1.0, np.inf]),
    ([[1.0, 2.0]], [[1.0, 2.0]]),
  ],
)
def test_bad_pairs_are_refused(function, a, b):
  with pytest.raises(ValueError):
    function(a, b)


@pytest.mark.parametrize(
  "call",
  [
    lambda: statistics.bootstrap_mean([]),
    lambda: statistics.student([1.0]),
    lambda: statistics.student([1.0, 2.0], confidence=1.0),
    lambda: statistics.bootstrap_mean([1.0, 2.0], num_resamples=0),
    lambda: statistics.bootstrap_mean([1.0, 2.0], confidence=1.0),
    lambda: statistics.paired_bootstrap_relative([1.0, 2.0], [0.0, 2.0]),
    lambda: statistics.holm([]),
    lambda: statistics.holm([0.5, np.nan]),
    lambda: statistics.holm([1.5]),
  ],
)
def test_bad_arguments_are_refused(call):
  with pytest.raises(ValueError):
    call()


def test_win_tie_loss_counts_intervals_by_their_side_of_zero():
  intervals = [(-2, -3, -1), (0, -1, 1), (2, 1, 3), (4, 1, 9), (1, 0, 2)]
  assert statistics.win_tie_loss(intervals) == (1, 2, 2)
  assert statistics.win_tie_loss(intervals, lower=False) == (2, 2, 1)
  with pytest.raises(ValueError, match="finite ends"):
    statistics.win_tie_loss([(1, math.nan, 2)])


def test_a_contrast_is_a_difference_of_differences():
  rng = np.random.default_rng(0)
  cells = rng.normal(size=(4, 10)) + 3 * rng.normal(size=10)  # seeds differ more than cells do
  interaction = statistics.paired_contrast(cells, (1, -1, -1, 1))
  differences = cells[0] - cells[1], cells[2] - cells[3]
  assert interaction == pytest.approx(statistics.paired_bootstrap(*differences))
  main = statistics.paired_contrast(cells, (0.5, 0.5, -0.5, -0.5))
  assert main == pytest.approx(statistics.bootstrap_mean((cells[:2] - cells[2:]).mean(axis=0)))


@pytest.mark.parametrize(
  ("values", "weights", "said"),
  [
    (np.zeros((3, 5)), (1, -1), "must be"),
    (np.zeros((2, 5)), (1, 1), "sum to zero"),
    (np.zeros((2, 5)), (0, 0), "not all be zero"),
    (np.zeros((2, 1)), (1, -1), "at least 2"),
    (np.full((2, 5), np.nan), (1, -1), "finite"),
  ],
)
def test_a_contrast_refuses_what_has_no_meaning(values, weights, said):
  with pytest.raises(ValueError, match=said):
    statistics.paired_contrast(values, weights)
