"""A frozen linear map from an encoder's space to the instruction width E of the adapter.

  e = scale * (x - mean) matrix

The directions are the principal components of the TRAINING texts about their mean. One global
scale gives the components unit root mean square over those texts. Nothing is learned, and held-out
texts use the same map. Centring is necessary: raw sentence embeddings of instructions have a large
common part, which would dominate every inner product.

Few texts: n distinct texts span n - 1 centred directions. Further columns of `matrix` are zero, and
the scale uses only the others. One distinct text spans no centred direction. The map then uses its
uncentred direction, so that it maps to the constant vector [1, 0, ..., 0].
"""

from typing import NamedTuple

import numpy as np

# Singular values below this fraction of the norm of all embeddings are float32 noise of the
# encoder: the same text in two padded batches differs by about 1e-7.
_RANK_TOLERANCE = 1e-5


class Projection(NamedTuple):
  """mean [E_full], matrix [E_full, dim] with orthonormal or zero columns, scale []: float32."""

  mean: np.ndarray
  matrix: np.ndarray
  scale: np.ndarray


def fit(embeddings: np.ndarray, dim: int) -> Projection:
  """Fits the projection to the training texts' embeddings; deterministic.

  The sign of each direction makes its entry of largest magnitude positive.

  Args:
    embeddings: [n, E_full], n >= 1, finite, not all zero.
    dim: width of the projected vectors.

  Raises:
    ValueError: empty, not two-dimensional, not finite or all-zero embeddings, or dim < 1.
  """
  x = np.asarray(embeddings, np.float64)
  if x.ndim != 2 or x.size == 0:
    raise ValueError(f"embeddings must be a non-empty matrix [n, E_full], got shape {x.shape}")
  if not np.isfinite(x).all():
    raise ValueError("embeddings must be finite")
  if not x.any():
    raise ValueError("embeddings must not all be zero")
  if dim < 1:
    raise ValueError(f"dim must be at least 1, got {dim}")

  mean = x.mean(axis=0)
  directions = _directions(x - mean, np.linalg.norm(x), dim)  # [r, E_full], r <= dim
  if len(directions) == 0:
    directions = (mean / np.linalg.norm(mean))[None]
    mean = np.zeros_like(mean)
  components = (x - mean) @ directions.T  # [n, r]
  matrix = np.zeros((x.shape[1], dim))
  matrix[:, : len(directions)] = directions.T
  return Projection(
    mean.astype(np.float32),
    matrix.astype(np.float32),
    np.asarray(1.0 / np.sqrt(np.mean(np.square(components))), np.float32),
  )


def apply(projection: Projection, embeddings: np.ndarray) -> np.ndarray:
  """Projects embeddings [n, E_full] to float32 [n, dim].

  Raises:
    ValueError: the embeddings' width differs from E_full of the projection.
  """
  x = np.asarray(embeddings)
  if x.ndim != 2 or x.shape[1] != len(projection.mean):
    raise ValueError(f"embeddings must be [n, {len(projection.mean)}], got shape {x.shape}")
  return (((x - projection.mean) @ projection.matrix) * projection.scale).astype(np.float32)


def _directions(centred: np.ndarray, norm: float, dim: int) -> np.ndarray:
  _, singular, rows = np.linalg.svd(centred, full_matrices=False)
  rows = rows[singular > _RANK_TOLERANCE * norm][:dim]
  largest = np.abs(rows).argmax(axis=1)
  signs = np.sign(rows[np.arange(len(rows)), largest])
  return rows * signs[:, None]
