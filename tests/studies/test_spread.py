"""Spread over seeds and seeds needed against textbooks and simulations."""

import math

import numpy as np
import pytest
from scipy import stats

from qlora_jax.studies import spread


def test_seeds_needed_matches_the_textbook_and_simulation():
  pilot = np.array([-1.0, 1.0]) / math.sqrt(2)  # standard deviation 1
  # Cohen's medium effect, d_z = .5: 34 pairs at power .8, 44 at .9 (G*Power).
  assert spread.seeds_needed(pilot, 0.5) == 34
  assert spread.seeds_needed(pilot, 0.5, power=0.9) == 44
  samples = np.random.default_rng(7).normal(0.5, 1, (4000, 34))
  found = stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05
  assert np.mean(found) == pytest.approx(0.8, abs=0.03)


def test_seeds_needed_has_a_floor_and_grows_with_precision():
  pilot = [0.1, 0.3, 0.2]
  assert spread.seeds_needed(pilot, 100.0) == spread.seeds_needed([0.1, 0.1], 1.0) == 6
  counts = [spread.seeds_needed(pilot, r) for r in (0.1, 0.05, 0.02, 0.01, 0.005, 0.001)]
  assert counts == sorted(counts) and len(set(counts)) == len(counts)
  # n = (1.960 + 0.842)^2 / d^2 for many seeds.
  assert counts[-1] == pytest.approx(7.849 * (0.1 / 0.001) ** 2, rel=1e-3)


def test_spread_ratio_covers_one_where_spreads_are_equal():
  rng = np.random.default_rng(0)
  hits = 0
  for trial in range(200):
    a, b = rng.normal(size=(2, 10)) + rng.normal(size=10)
    found = spread.paired_spread_ratio(a, b, num_resamples=400, seed=trial)
    hits += found.low <= 1 <= found.high
  assert 0.82 <= hits / 200 <= 0.97


def test_spread_ratio_is_that_of_the_sample():
  a = np.random.default_rng(1).normal(size=12)
  found = spread.paired_spread_ratio(3 * a, a)
  assert found == pytest.approx((3, 3, 3))
  with pytest.raises(ValueError, match="at least 6"):
    spread.paired_spread_ratio(a[:5], a[:5])
  with pytest.raises(ValueError, match="differ"):
    spread.paired_spread_ratio(a, np.ones(12))


@pytest.mark.parametrize(
  "call",
  [
    lambda: spread.standard_deviation([1.0]),
    lambda: spread.seeds_needed([1.0], 1.0),
    lambda: spread.seeds_needed([1.0, 2.0], 0.0),
    lambda: spread.seeds_needed([1.0, 2.0], 1.0, power=1.0),
  ],
)
def test_bad_arguments_are_refused(call):
  with pytest.raises(ValueError):
    call()
