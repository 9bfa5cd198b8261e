"""Training stability as numbers: loss spikes, the basin of learning rates, diverged runs.

`docs/protocol.md` defines them. Errors as in `statistics`: a ValueError for what has no meaning.
"""

import numpy as np
from numpy.typing import ArrayLike

from qlora_jax.studies import statistics


def loss_spikes(losses: ArrayLike, tolerance: float = 0.5, window: int = 10) -> np.ndarray:
  """How often each run's training loss jumps up.

  A recorded loss is high where it is not finite or exceeds (1 + tolerance) times the median of the
  `window` recorded losses before it (of those there are); what is high without a break is one
  spike, so that a run that diverges for good has one more. The median and a tolerance well above
  the noise of a recorded loss keep that noise from being counted; what is shorter than the
  distance of two records and is averaged away in them is not seen.

  Args:
    losses: [..., n] in the order of the steps, not negative; may be non-finite.

  Returns:
    int [...].

  Raises:
    ValueError: no losses, a negative one, or tolerance or window not positive.
  """
  losses = np.asarray(losses, np.float64)
  if losses.ndim < 1 or not losses.shape[-1]:
    raise ValueError(f"losses must be [..., n] with n at least 1, got shape {losses.shape}")
  if (losses < 0).any():
    raise ValueError("losses must not be negative: a spike is relative to the losses before it")
  if not tolerance > 0 or window < 1:
    raise ValueError("tolerance and window must be positive")
  known = np.where(np.isfinite(losses), losses, np.nan)
  padded = np.pad(known, [(0, 0)] * (losses.ndim - 1) + [(window, 0)], constant_values=np.nan)
  before = np.lib.stride_tricks.sliding_window_view(padded[..., :-1], window, axis=-1)
  before = np.sort(before, axis=-1)  # [..., n, window], NaN last
  count = np.isfinite(before).sum(axis=-1)
  middle = [
    np.take_along_axis(before, np.maximum(place, 0)[..., None], axis=-1)[..., 0]
    for place in ((count - 1) // 2, np.minimum(count // 2, window - 1))
  ]
  high = ~np.isfinite(losses) | (losses > (1 + tolerance) * (middle[0] + middle[1]) / 2)
  return high[..., 0] + (high[..., 1:] & ~high[..., :-1]).sum(axis=-1)


def learning_rate_basin(
  learning_rates: ArrayLike, losses: ArrayLike, tolerance: float = 0.05
) -> float:
  """Width, in decades, of the learning rates about the best whose loss is nearly as good.

  "Nearly": mean loss <= best + tolerance |best|. The set is contiguous: it ends at the first rate
  on either side that is worse, where the edge is found by interpolating the loss linearly in
  log10 of the rate. It also ends at the grid, where the width is a lower bound, and at the last
  good rate before a diverged one. Ties for the best go to the lower rate.

  Args:
    learning_rates: [n] positive and distinct, in any order.
    losses: [n], or [n, seeds], averaged over seeds here. Non-finite counts as infinitely bad,
      so one diverged seed rules its rate out.

  Returns:
    Decades, 0 when a single rate is good or every one diverged.

  Raises:
    ValueError: shapes that do not fit, rates not positive or repeated, or negative tolerance.
  """
  rates = statistics.vector("learning_rates", learning_rates)
  losses = np.asarray(losses, np.float64)
  if losses.ndim not in (1, 2) or len(losses) != len(rates) or losses.size == 0:
    raise ValueError(f"losses must be [{len(rates)}] or [{len(rates)}, seeds], got {losses.shape}")
  if (rates <= 0).any() or len(np.unique(rates)) != len(rates):
    raise ValueError("learning_rates must be positive and distinct")
  if not tolerance >= 0:
    raise ValueError(f"tolerance must not be negative, got {tolerance}")

  losses = np.where(np.isfinite(losses), losses, np.inf).reshape(len(rates), -1).mean(axis=1)
  order = np.argsort(rates)
  positions, losses = np.log10(rates[order]), losses[order]
  best = int(np.argmin(losses))
  if not np.isfinite(losses[best]):
    return 0.0
  limit = losses[best] + tolerance * abs(losses[best])
  right = _edge(positions[best:], losses[best:], limit)
  left = _edge(positions[best::-1], losses[best::-1], limit)
  return float(right - left)


def diverged_share(losses: ArrayLike, reference: float) -> float:
  """Share of runs whose final loss is non-finite or worse than `reference`, the unadapted base.

  Args:
    losses: any shape, one entry per run; may be non-finite.

  Raises:
    ValueError: no runs, or a reference that is not finite.
  """
  losses = np.asarray(losses, np.float64)
  if losses.size == 0:
    raise ValueError("losses must not be empty")
  if not np.isfinite(reference):
    raise ValueError(f"reference must be finite, got {reference}")
  return float(np.mean(~np.isfinite(losses) | (losses > reference)))


def _edge(positions: np.ndarray, losses: np.ndarray, limit: float) -> float:
  """Where the loss first exceeds `limit`, walking from the best rate (entry 0) to the last."""
  worse = np.flatnonzero(losses > limit)
  if len(worse) == 0:
    return positions[-1]
  after = worse[0]
  inside, outside = losses[after - 1], losses[after]
  share = (limit - inside) / (outside - inside)  # 0 next to an infinite loss
  return positions[after - 1] + share * (positions[after] - positions[after - 1])
