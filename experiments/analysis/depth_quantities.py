"""Similarity of routings: numbers on mean weights [G, N, M] of G parts, N blocks and M atoms.

Lin (1991), Divergence measures based on the Shannon entropy.
"""

from collections.abc import Callable

import numpy as np
from scipy import stats

Similarity = Callable[[np.ndarray, np.ndarray], np.ndarray]


def js_similarity(p: np.ndarray, q: np.ndarray) -> np.ndarray:
  """1 - JSD(p, q) in bits over the last axis: 1 for equal distributions, 0 for disjoint ones."""

  def divergence(a, b):
    ratio = np.where(a > 0, a / np.where(b > 0, b, 1.0), 1.0)
    return np.sum(a * np.log2(ratio), axis=-1)

  middle = (p + q) / 2
  return 1.0 - (divergence(p, middle) + divergence(q, middle)) / 2


def centred_cosine(p: np.ndarray, q: np.ndarray) -> np.ndarray:
  """Cosine of p - 1/M and q - 1/M, which nearly uniform weights need; 0 for uniform weights."""
  p, q = (weights - weights.mean(axis=-1, keepdims=True) for weights in (p, q))
  norm = np.linalg.norm(p, axis=-1) * np.linalg.norm(q, axis=-1)
  return np.sum(p * q, axis=-1) / np.where(norm > 0, norm, np.inf)


SIMILARITIES: dict[str, Similarity] = {"js": js_similarity, "cosine": centred_cosine}


def across_blocks(weights: np.ndarray, similarity: Similarity) -> float:
  """Mean similarity of two blocks' weights in the same part, over all pairs of blocks and parts."""
  first, second = np.triu_indices(weights.shape[1], 1)
  return float(np.mean(similarity(weights[:, first], weights[:, second])))


def across_parts(weights: np.ndarray, similarity: Similarity) -> float:
  """Mean similarity of two parts' weights in the same block, over all pairs of parts and blocks."""
  return across_blocks(np.swapaxes(weights, 0, 1), similarity)


def atoms_renamed(
  weights: np.ndarray, similarity: Similarity, draws: int, seed: int = 0
) -> np.ndarray:
  """`across_blocks` [draws] with the atoms of each block in a random order.

  The baseline is blocks with weights as peaked as these whose atoms are unrelated. The parts of a
  block keep a common order.
  """
  rng = np.random.default_rng(seed)
  similarities = []
  for _ in range(draws):
    orders = [rng.permutation(weights.shape[-1]) for _ in range(weights.shape[1])]
    renamed = np.stack([weights[:, b, order] for b, order in enumerate(orders)], axis=1)
    similarities.append(across_blocks(renamed, similarity))
  return np.array(similarities)


def shares(weights: np.ndarray, part: np.ndarray, count: int) -> np.ndarray:
  """Mean weights [G, N, M] of the examples of each part, from weights [N, n, M]."""
  one_hot = np.eye(count)[part]
  return np.einsum("ntm,tg->gnm", weights, one_hot) / one_hot.sum(axis=0)[:, None, None]


def effective_support(weights: np.ndarray) -> float:
  """Mean of 1 / sum_m w_m^2 over all but the last axis: between 1 and M."""
  return float(np.mean(1.0 / np.sum(np.square(weights), axis=-1)))


def rank_correlation(usage: np.ndarray, effect: np.ndarray) -> float:
  """Spearman's correlation of two arrays of one shape."""
  return float(stats.spearmanr(usage.ravel(), effect.ravel()).statistic)
