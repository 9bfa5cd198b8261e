"""Noise of unit standard deviation: one column per kind, all from the same normal draw.

A noisy target is `clean + level * noise[kind]`, where the unit of the level is the source
target's standard deviation. All kinds of one example share the same standard normal z, so that
differences between kinds and levels do not include differences between draws.

  gaussian               z
  heteroscedastic        h(x) z,  h(x) = (1 + 6 x₁) / √19
  student_t              z / √(χ²₃ / 3) / √3, a Student t with 3 degrees of freedom
  outliers               z (8 z in 5 % of the examples) / √4.15
  heavy_heteroscedastic  h(x) times the student_t draw
"""

import numpy as np

from qlora_jax import errors

KINDS = ("gaussian", "heteroscedastic", "student_t", "outliers", "heavy_heteroscedastic")

DEGREES_OF_FREEDOM = 3
OUTLIER_SHARE = 0.05
OUTLIER_SCALE = 8.0


def draw(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Draws every kind of noise for every example.

  Args:
    x: inputs in the unit cube, float [n, d]. The scale of the heteroscedastic kinds grows by a
      factor of seven along the first feature.
    rng: generator; the result is a pure function of the generator's state and x.

  Returns:
    float32 [n, len(KINDS)], each column of mean zero and (population) standard deviation one.
  """
  n = len(x)
  z = rng.standard_normal(n)
  tail = np.sqrt(rng.chisquare(DEGREES_OF_FREEDOM, n) / DEGREES_OF_FREEDOM)
  student_t = z / tail / np.sqrt(DEGREES_OF_FREEDOM / (DEGREES_OF_FREEDOM - 2))
  is_outlier = rng.random(n) < OUTLIER_SHARE
  outlier_variance = 1 - OUTLIER_SHARE + OUTLIER_SHARE * OUTLIER_SCALE**2
  scale = heteroscedastic_scale(x)
  columns = {
    "gaussian": z,
    "heteroscedastic": scale * z,
    "student_t": student_t,
    "outliers": z * np.where(is_outlier, OUTLIER_SCALE, 1.0) / np.sqrt(outlier_variance),
    "heavy_heteroscedastic": scale * student_t,
  }
  return np.stack([columns[kind] for kind in KINDS], axis=1).astype(np.float32)


def heteroscedastic_scale(x: np.ndarray) -> np.ndarray:
  """Returns (1 + 6 x₁) / √19, [n]; the square has mean 1 for a uniform x₁."""
  return (1 + 6 * x[:, 0]) / np.sqrt(19)


def kind_index(kind: str) -> int:
  """Returns the column of a noise kind. Raises UserError for an unknown kind."""
  if kind not in KINDS:
    raise errors.UserError(f"unknown noise_kind {kind!r}; known: {', '.join(KINDS)}")
  return KINDS.index(kind)
