"""Properties of the frozen projection."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from qlora_jax.instructions import projection


def _units(seed, n, width, common=2.0):
  """Unit rows with a large common part, like sentence embeddings of instructions."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, width)) + common * rng.normal(size=width)
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 10_000),
  n=st.integers(2, 30),
  width=st.integers(2, 40),
  dim=st.integers(1, 45),
)
def test_training_texts_are_centred_with_unit_rms(seed, n, width, dim):
  x = _units(seed, n, width)
  fitted = projection.fit(x, dim)
  e = projection.apply(fitted, x)
  rank = min(n - 1, width, dim)
  assert e.shape == (n, dim) and e.dtype == np.float32
  np.testing.assert_allclose(e.mean(axis=0), 0, atol=1e-4)
  np.testing.assert_allclose(np.sqrt(np.mean(np.square(e[:, :rank]))), 1, rtol=1e-4)
  np.testing.assert_array_equal(e[:, rank:], 0)  # directions that do not exist
  columns = fitted.matrix[:, :rank]
  np.testing.assert_allclose(columns.T @ columns, np.eye(rank), atol=1e-5)


def test_directions_match_the_eigenvectors_of_the_covariance():
  x = _units(0, 50, 6)
  fitted = projection.fit(x, 3)
  _, vectors = np.linalg.eigh(np.cov(x.astype(np.float64).T))
  expected = vectors[:, ::-1][:, :3]
  np.testing.assert_allclose(np.abs(fitted.matrix), np.abs(expected), atol=1e-5)


def test_full_projection_keeps_distances_up_to_the_scale():
  x = _units(1, 8, 20)
  fitted = projection.fit(x, 7)
  e = projection.apply(fitted, x)
  distances = np.linalg.norm(x[:, None] - x, axis=-1)
  projected = np.linalg.norm(e[:, None] - e, axis=-1)
  np.testing.assert_allclose(projected, fitted.scale * distances, atol=1e-4)


def test_largest_entry_of_each_direction_is_positive_and_the_fit_repeats():
  x = _units(2, 20, 10)
  fitted = projection.fit(x, 5)
  largest = np.abs(fitted.matrix).argmax(axis=0)
  assert (fitted.matrix[largest, np.arange(5)] > 0).all()
  for first, again in zip(fitted, projection.fit(x[::-1], 5), strict=True):
    np.testing.assert_allclose(
      first, again, rtol=1e-4, atol=1e-5
    )  # the order does not matter either


@pytest.mark.parametrize("copies", [1, 4])
def test_one_distinct_text_maps_to_a_constant_unit_vector(copies):
  x = np.repeat(_units(3, 1, 12), copies, axis=0)
  e = projection.apply(projection.fit(x, 4), x)
  np.testing.assert_allclose(np.abs(e), np.tile([1, 0, 0, 0], (copies, 1)), atol=1e-5)


def test_encoder_noise_is_no_direction():
  x = np.repeat(_units(4, 1, 12), 6, axis=0)
  noisy = x + np.random.default_rng(0).normal(scale=1e-7, size=x.shape).astype(np.float32)
  e = projection.apply(projection.fit(noisy, 4), x)
  np.testing.assert_allclose(np.abs(e), np.tile([1, 0, 0, 0], (6, 1)), atol=1e-4)


def test_one_distinct_text_keeps_its_sign_whatever_its_entries():
  x = np.array([[-0.8, 0.6]], np.float32)
  e = projection.apply(projection.fit(x, 1), x)
  np.testing.assert_allclose(e, [[1.0]], rtol=1e-6)


def test_two_texts_map_to_opposite_signs():
  x = _units(5, 2, 12)
  e = projection.apply(projection.fit(x, 3), x)
  np.testing.assert_allclose(np.abs(e), [[1, 0, 0]] * 2, atol=1e-4)
  assert e[0, 0] * e[1, 0] < 0


def test_held_out_texts_use_the_training_map():
  x = _units(6, 20, 10)
  fitted = projection.fit(x[:15], 4)
  expected = (x[15:].astype(np.float64) - fitted.mean) @ fitted.matrix * fitted.scale
  np.testing.assert_allclose(projection.apply(fitted, x[15:]), expected, atol=1e-5)


@pytest.mark.parametrize(
  ("embeddings", "dim", "message"),
  [
    (np.zeros((0, 4)), 2, "non-empty"),
    (np.ones(4), 2, "non-empty"),
    (np.zeros((3, 4)), 2, "zero"),
    (np.full((3, 4), np.nan), 2, "finite"),
    (np.eye(4), 0, "dim"),
  ],
)
def test_bad_input_is_refused(embeddings, dim, message):
  with pytest.raises(ValueError, match=message):
    projection.fit(embeddings, dim)


def test_apply_refuses_another_width():
  with pytest.raises(ValueError, match=r"\[n, 10\]"):
    projection.apply(projection.fit(_units(7, 5, 10), 2), np.ones((2, 9)))
