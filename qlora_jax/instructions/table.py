"""The table of instruction vectors that a training reads: embedded, then projected."""

import os
from collections.abc import Sequence

import numpy as np

from qlora_jax.instructions import cache, projection


def embedded(
  texts: Sequence[str],
  training_rows: Sequence[int],
  encoder: str,
  dim: int,
  cache_dir: str | os.PathLike | None = None,
) -> tuple[np.ndarray, projection.Projection]:
  """Vectors float32 [texts, dim] of instructions, and the projection that made them.

  Args:
    texts: instructions; none is empty.
    training_rows: the texts that training sees, which the projection is fitted to.
    encoder: a name of `encoders.NAMES`.
    dim: E.
    cache_dir: of the embeddings; None for `cache.default_dir`.
  """
  vectors = cache.embed(texts, encoder, cache_dir)
  fitted = projection.fit(vectors[training_rows], dim)
  return projection.apply(fitted, vectors), fitted
