"""Noise kinds: unit scale, pairing, shape of the tails."""

import numpy as np
import pytest

from qlora_jax import errors
from qlora_jax.data import noise

_NUM_ROWS = 400_000


@pytest.fixture(scope="module")
def sample():
  x = np.random.default_rng(0).random((_NUM_ROWS, 3))
  return x, noise.draw(x, np.random.default_rng(1)).astype(np.float64)


def test_every_kind_has_mean_zero_and_unit_std(sample):
  _, draws = sample
  np.testing.assert_allclose(draws.mean(axis=0), 0, atol=0.01)
  light = [noise.kind_index(kind) for kind in ("gaussian", "heteroscedastic", "outliers")]
  np.testing.assert_allclose(draws[:, light].std(axis=0), 1, atol=0.01)
  # Three degrees of freedom have no fourth moment: the sample std converges slowly.
  np.testing.assert_allclose(draws.std(axis=0), 1, atol=0.1)


def test_student_t_quantiles_are_those_of_three_degrees_of_freedom(sample):
  _, draws = sample
  student = draws[:, noise.kind_index("student_t")] * np.sqrt(3)
  np.testing.assert_allclose(np.quantile(student, (0.75, 0.95)), (0.7649, 2.3534), atol=0.02)


def test_heteroscedastic_scale_grows_seven_times_along_the_first_feature(sample):
  x, draws = sample
  column = draws[:, noise.kind_index("heteroscedastic")]
  low, high = column[x[:, 0] < 0.02].std(), column[x[:, 0] > 0.98].std()
  np.testing.assert_allclose(high / low, (1 + 6 * 0.99) / (1 + 6 * 0.01), rtol=0.05)


def test_outliers_are_five_percent_at_eight_sigma(sample):
  _, draws = sample
  ratio = draws[:, noise.kind_index("outliers")] / draws[:, noise.kind_index("gaussian")]
  is_outlier = ratio > 1
  np.testing.assert_allclose(is_outlier.mean(), 0.05, atol=0.002)
  np.testing.assert_allclose(ratio[is_outlier] / ratio[~is_outlier].mean(), 8, rtol=1e-4)


def test_kinds_share_the_sign_of_one_normal_draw(sample):
  _, draws = sample
  assert (np.sign(draws) == np.sign(draws[:, :1])).all()


def test_unknown_kind_lists_the_known():
  with pytest.raises(errors.UserError, match=r"'cauchy'.*known: gaussian"):
    noise.kind_index("cauchy")
