"""The source and target functions against formulas written out by hand."""

import math

import numpy as np
import pytest

from qlora_jax import errors
from qlora_jax.data import functions


def _cube(num_rows, num_features, seed=0):
  return np.random.default_rng(seed).random((num_rows, num_features))


def test_friedman1_matches_its_formula():
  for row in _cube(20, 10):
    expected = 10 * math.sin(math.pi * row[0] * row[1]) + 20 * (row[2] - 0.5) ** 2
    expected += 10 * row[3] + 5 * row[4]
    np.testing.assert_allclose(functions.friedman1(row[None])[0], expected, rtol=1e-12)


def test_friedman2_and_3_match_their_formulas_in_the_usual_ranges():
  for row in _cube(20, 4):
    v0, v2 = 100 * row[0], row[2]
    v1 = 40 * math.pi + 520 * math.pi * row[1]
    v3 = 1 + 10 * row[3]
    inner = v1 * v2 - 1 / (v1 * v3)
    np.testing.assert_allclose(functions.friedman2(row[None])[0], (v0**2 + inner**2) ** 0.5)
    np.testing.assert_allclose(functions.friedman3(row[None])[0], math.atan(inner / v0))


def test_friedman3_is_finite_where_the_denominator_vanishes():
  assert np.isfinite(functions.friedman3(np.array([[0.0, 0.5, 0.5, 0.5]]))).all()


def test_friedman1_ignores_its_last_five_features():
  x = _cube(50, 10)
  moved = x.copy()
  moved[:, 5:] = _cube(50, 5, seed=1)
  for function in (functions.friedman1, functions.friedman1_shifted, functions.regimes_shifted):
    np.testing.assert_array_equal(function(x), function(moved))


def test_friedman1_std_constant_is_right_to_one_percent():
  np.testing.assert_allclose(
    functions.friedman1(_cube(200_000, 10)).std(), functions.FRIEDMAN1_STD, rtol=0.01
  )


@pytest.mark.parametrize("name", functions.TASKS)
def test_every_target_differs_from_its_source_by_a_comparable_amount(name):
  task = functions.TASKS[name]
  x = _cube(20_000, task.num_features)
  source = task.source(x)
  for target in task.targets.values():
    shift = np.mean((target(x) - source) ** 2) / source.var()
    assert 0.3 < shift < 4


def test_corrections_have_mean_zero_and_unit_variance_and_are_uncorrelated():
  x = _cube(200_000, 10)
  values = np.stack([correction(x) for correction in functions.CORRECTIONS.values()])
  np.testing.assert_allclose(values.mean(axis=1), 0, atol=0.01)  # 4 standard errors
  np.testing.assert_allclose(np.cov(values), np.eye(6), atol=0.02)


def test_regions_are_the_eight_octants_with_different_corrections():
  corners = np.array([[i & 1, i >> 1 & 1, i >> 2 & 1] for i in range(8)])
  x = np.full((8, 10), 0.5)
  x[:, :3] = 0.25 + 0.5 * corners
  np.testing.assert_array_equal(functions.region(x), np.arange(8))
  centre = np.full((8, 10), 0.5)
  centre[:, :3] += 1e-9 * (2 * corners - 1)
  correction = functions.regimes_shifted(centre) - functions.friedman1(centre)
  assert np.unique(correction.round(3)).size == 8


def test_target_values_follow_the_target_id():
  task = functions.TASKS["multi_target"]
  x = _cube(60, 10)
  target_id = np.arange(60) % 6
  values = functions.target_values(task, x, target_id)
  for position, function in enumerate(task.targets.values()):
    np.testing.assert_array_equal(values[position::6], function(x[position::6]))


def test_unknown_task_lists_the_known():
  with pytest.raises(errors.UserError, match=r"'frieman1'.*known: friedman1, friedman2"):
    functions.synthetic_task("frieman1")
