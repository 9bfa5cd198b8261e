"""How far results scatter over seeds, and how many seeds a difference needs.

Conventions as in `statistics.py`: `a` and `b` are one metric of two methods, one entry per seed.
"""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from qlora_jax.studies import statistics


def standard_deviation(a: ArrayLike) -> float:
  """Sample standard deviation (n - 1).

  Raises:
    ValueError: fewer than two values, or one that is not finite.
  """
  return float(np.std(statistics.vector("a", a, minimum=2), ddof=1))


def paired_spread_ratio(
  a: ArrayLike,
  b: ArrayLike,
  *,
  num_resamples: int = 10_000,
  confidence: float = 0.95,
  seed: int = 0,
) -> statistics.Interval:
  """Percentile bootstrap interval of std(a) / std(b), seeds resampled in pairs.

  Below 1 method `a` depends less on the seed than `b`. A standard deviation needs more values than
  a mean: for 10 normal pairs of equal spread the 95 % interval is typically [0.51, 1.84], and it
  holds 1 in about 90 % of cases.

  Raises:
    ValueError: fewer than six pairs, unequal lengths, a value that is not finite, or values of
      either that are all equal.
  """
  a, b = statistics.pair(a, b)
  if len(a) < 6:
    raise ValueError(f"a spread needs at least 6 pairs, got {len(a)}")
  if statistics.is_constant(a, a) or statistics.is_constant(b, b):
    raise ValueError("the values of a and of b must differ among themselves")

  def ratio(x, y, axis):
    # Of a resample of one seed alone, 1 in 6^5 or fewer, nothing is known.
    with np.errstate(divide="ignore", invalid="ignore"):
      ratios = np.std(x, axis=axis, ddof=1) / np.std(y, axis=axis, ddof=1)
    return np.where(np.isfinite(ratios), ratios, 1.0)

  return statistics.resampled_interval(ratio, (a, b), False, num_resamples, confidence, seed)


def seeds_needed(differences: ArrayLike, resolution: float, power: float = 0.8) -> int:
  """Seeds with which a paired test would find a mean difference as small as `resolution`.

  The two-sided paired t-test at the 5 % level, with the standard deviation of a pilot's
  differences: the smallest n whose power (noncentral t) is at least `power`. Never below 6,
  because under 6 pairs `statistics.paired_p_value` cannot fall below .05. The pilot's standard
  deviation is itself uncertain (with 5 seeds the true one is between 0.6 and 2.9 times it), and the
  answer is proportional to its square.

  Args:
    differences: paired differences of a pilot, at least two.
    resolution: the difference worth finding, in the same units, positive.

  Raises:
    ValueError: bad differences, resolution not positive, or power outside (0, 1).
  """
  deviation = standard_deviation(differences)
  if not 0 < resolution < math.inf:
    raise ValueError(f"resolution must be positive, got {resolution}")
  if not 0 < power < 1:
    raise ValueError(f"power must lie in (0, 1), got {power}")
  least = math.ceil(math.log2(2 / statistics.SIGNIFICANCE))
  if deviation == 0:
    return least
  quantiles = stats.norm.ppf(1 - statistics.SIGNIFICANCE / 2) + max(0.0, stats.norm.ppf(power))
  normal = (quantiles * deviation / resolution) ** 2
  if normal > 1000:  # the t-test's own correction, below 3 seeds, no longer matters
    return math.ceil(normal + stats.norm.ppf(1 - statistics.SIGNIFICANCE / 2) ** 2 / 2)
  # The t-test never needs fewer pairs than the normal approximation.
  count = max(least, math.floor(normal)) if power >= 0.5 else least
  while _power(count, resolution / deviation) < power:
    count += 1
  return count


def _power(count: int, effect: float) -> float:
  freedom, noncentrality = count - 1, effect * math.sqrt(count)
  critical = stats.t.ppf(1 - statistics.SIGNIFICANCE / 2, freedom)
  # Beyond 30 the power is 1, and SciPy's noncentral t loses its digits.
  return 1.0 if noncentrality > 30 + critical else stats.nct.sf(critical, freedom, noncentrality)
