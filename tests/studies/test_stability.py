"""Basins of the learning rate, divergence and loss spikes against hand computations."""

import itertools
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from qlora_jax.studies import stability

_VALUES = st.floats(-1e3, 1e3, allow_nan=False)
_FEW = hypothesis.settings(max_examples=30, deadline=None)


def test_basin_of_a_parabola_matches_its_closed_form():
  decades = np.linspace(-4, 0, 401)
  losses = 2.0 * (1 + 0.2 * (decades + 2) ** 2)  # within 5 % for |decades + 2| <= .5
  assert stability.learning_rate_basin(10**decades, losses) == pytest.approx(1.0, abs=1e-4)


def test_basin_edges_are_interpolated_in_log_rate():
  # Limit 1.05: a fifth of the way from 1.0 to 1.25 on the right, half of that to 1.5 on the left.
  width = stability.learning_rate_basin([1e-3, 1e-2, 1e-1], [1.5, 1.0, 1.25])
  assert width == pytest.approx(0.1 + 0.2)


def test_basin_is_contiguous_and_ends_at_the_grid_and_at_divergence():
  rates = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
  assert stability.learning_rate_basin(rates, [1.0] * 5) == pytest.approx(4)
  assert stability.learning_rate_basin(rates, [1, 1, np.nan, 1, 1]) == pytest.approx(1)
  assert stability.learning_rate_basin(rates, [np.inf, np.nan, 1, np.inf, 1]) == 0
  assert stability.learning_rate_basin(rates, [np.nan] * 5) == 0
  assert stability.learning_rate_basin([1e-3], [1.0]) == 0


def test_one_diverged_seed_rules_out_its_rate():
  losses = [[1, 1], [1, 1], [1, np.nan]]
  assert stability.learning_rate_basin([1e-3, 1e-2, 1e-1], losses) == pytest.approx(1)


@_FEW
@hypothesis.given(
  st.lists(st.floats(0.1, 10) | st.just(math.inf), min_size=1, max_size=9), st.randoms()
)
def test_basin_ignores_order_and_unit_and_grows_with_tolerance(losses, random):
  rates = 10.0 ** np.arange(-len(losses), 0)
  width = stability.learning_rate_basin(rates, losses)
  assert 0 <= width <= len(losses) - 1 + 1e-9
  shuffle = random.sample(range(len(losses)), len(losses))
  shuffled = stability.learning_rate_basin(7 * rates[shuffle], np.array(losses)[shuffle])
  assert shuffled == pytest.approx(width, abs=1e-9)
  assert stability.learning_rate_basin(rates, losses, 0.2) >= width - 1e-12


def test_diverged_share_counts_non_finite_and_worse_than_the_base():
  losses = [[0.5, 1.0, 1.1], [np.nan, np.inf, 0.9]]
  assert stability.diverged_share(losses, 1.0) == pytest.approx(3 / 6)


@pytest.mark.parametrize(
  ("losses", "spikes"),
  [
    ([4, 3, 2, 1], 0),
    ([4, 3, 2, 2.9, 2], 0),  # within half of the median before
    ([2, 2, 2, 9, 8, 2, 2], 1),  # two high records in a row are one spike
    ([2, 2, 9, 2, 2, 2, 9, 2], 2),
    ([2, 2, math.nan, math.nan], 1),  # diverged for good
    ([math.inf, 2, 2, 9], 2),
    ([5], 0),
    ([8, 8, *[2] * 9, 3.5], 1),  # the two high ones have left half of the window
  ],
)
def test_loss_spikes(losses, spikes):
  assert stability.loss_spikes(losses) == spikes


def test_loss_spikes_of_many_runs_match_a_plain_loop():
  losses = np.exp(np.random.default_rng(0).normal(size=(6, 40)))
  losses[2, 7:12], losses[3, 0], losses[4, 20:] = np.inf, np.nan, np.nan
  for window in (1, 4, 50):
    expected = []
    for run in losses:
      high = [not np.isfinite(run[0])]
      for index in range(1, 40):
        before = run[max(0, index - window) : index]
        before = before[np.isfinite(before)]
        jumped = len(before) > 0 and run[index] > 1.5 * np.median(before)
        high.append(jumped or not np.isfinite(run[index]))
      expected.append(sum(now and not was for was, now in itertools.pairwise([False, *high])))
    np.testing.assert_array_equal(stability.loss_spikes(losses, window=window), expected)


def test_loss_spikes_refuses_what_has_no_meaning():
  for losses, more in (([], {}), ([1, -1], {}), ([1, 2], {"tolerance": 0}), ([1], {"window": 0})):
    with pytest.raises(ValueError):
      stability.loss_spikes(losses, **more)


@pytest.mark.parametrize(
  "call",
  [
    lambda: stability.learning_rate_basin([], []),
    lambda: stability.learning_rate_basin([1.0, 2.0], [1.0]),
    lambda: stability.learning_rate_basin([0.0, 2.0], [1.0, 1.0]),
    lambda: stability.learning_rate_basin([2.0, 2.0], [1.0, 1.0]),
    lambda: stability.learning_rate_basin([1.0, 2.0], [1.0, 1.0], -0.1),
    lambda: stability.diverged_share([], 1.0),
    lambda: stability.diverged_share([1.0], np.nan),
  ],
)
def test_bad_arguments_are_refused(call):
  with pytest.raises(ValueError):
    call()
