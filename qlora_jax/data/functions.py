"""Source and target functions of the synthetic regression tasks, in plain NumPy.

Every function maps inputs `x` in the unit cube, float64 [n, d], to float64 [n]. A task has one
clean *source* function and one or more *shifted* targets. The base network is pre-trained on the
source, and the adapters learn the targets. Friedman's functions come from Friedman (1991),
"Multivariate adaptive regression splines", and Breiman (1996), "Bagging predictors".
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from qlora_jax import errors

Function = Callable[[np.ndarray], np.ndarray]

# Standard deviation of Friedman-1 over the unit cube; the unit of all corrections.
FRIEDMAN1_STD = 4.88
NUM_REGIONS = 8
_REGION_SEED = 2605


@dataclasses.dataclass(frozen=True)
class SyntheticTask:
  """A source function and the targets that adapters are trained on.

  Attributes:
    num_features: d, the width of the unit cube.
    source_name: tasks with the same source name share their source rows.
    source: the function that the base network learns.
    targets: the targets' functions by name; `target_id` is a position in this dictionary.
    default_noise: the noise kind when the caller names none.
  """

  num_features: int
  source_name: str
  source: Function
  targets: dict[str, Function]
  default_noise: str = "gaussian"


def friedman1(x: np.ndarray) -> np.ndarray:
  """10 sin(π x₁x₂) + 20 (x₃ - ½)² + 10 x₄ + 5 x₅; features past the fifth are irrelevant."""
  bowl = 20 * (x[:, 2] - 0.5) ** 2
  return 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + bowl + 10 * x[:, 3] + 5 * x[:, 4]


def friedman1_shifted(x: np.ndarray) -> np.ndarray:
  """8 sin(1.5π x₁x₂) + 20 (x₃ - 0.3)² + 5 x₄ + 10 x₅."""
  bowl = 20 * (x[:, 2] - 0.3) ** 2
  return 8 * np.sin(1.5 * np.pi * x[:, 0] * x[:, 1]) + bowl + 5 * x[:, 3] + 10 * x[:, 4]


def friedman_ranges(x: np.ndarray) -> np.ndarray:
  """Maps the unit cube to the ranges of Friedman-2 and -3.

  Returns:
    float64 [n, 4]: [0, 100], [40π, 560π], [0, 1] and [1, 11].
  """
  low = np.array([0.0, 40 * np.pi, 0.0, 1.0])
  high = np.array([100.0, 560 * np.pi, 1.0, 11.0])
  return low + (high - low) * x


def friedman2(x: np.ndarray, a: float = 1.0, b: float = 1.0, c: float = 1.0) -> np.ndarray:
  """√((a v₁)² + (b v₂v₃ - c / (v₂v₄))²) with v the inputs in their usual ranges."""
  v = friedman_ranges(x)
  return np.hypot(a * v[:, 0], b * v[:, 1] * v[:, 2] - c / (v[:, 1] * v[:, 3]))


def friedman2_shifted(x: np.ndarray) -> np.ndarray:
  """Friedman-2 with a = 8, b = 0.7, c = 100 000."""
  return friedman2(x, a=8.0, b=0.7, c=1e5)


def friedman3(x: np.ndarray, a: float = 1.0, b: float = 1.0, c: float = 1.0) -> np.ndarray:
  """arctan((b v₂v₃ - c / (v₂v₄)) / (a v₁)) with v the inputs in their usual ranges."""
  v = friedman_ranges(x)
  return np.arctan2(b * v[:, 1] * v[:, 2] - c / (v[:, 1] * v[:, 3]), a * v[:, 0])


def friedman3_shifted(x: np.ndarray) -> np.ndarray:
  """Friedman-3 with a = 4, b = 0.7, c = 30 000."""
  return friedman3(x, a=4.0, b=0.7, c=3e4)


def sines(x: np.ndarray) -> np.ndarray:
  """Σᵢ aᵢ sin(2π ωᵢ xᵢ) + ½ sin(2π (x₁ + x₂)) over the first four of six features."""
  return _sines(x, frequency=1.0, phase=0.0)


def sines_shifted(x: np.ndarray) -> np.ndarray:
  """`sines` with every frequency times 1.75 and every phase moved by π/3."""
  return _sines(x, frequency=1.75, phase=np.pi / 3)


def _sines(x: np.ndarray, frequency: float, phase: float) -> np.ndarray:
  amplitudes, omegas = np.array([1.0, 0.8, 0.6, 0.5]), np.array([1.0, 1.25, 1.5, 2.0])
  waves = np.sin(2 * np.pi * frequency * omegas * x[:, :4] + phase) @ amplitudes
  return waves + 0.5 * np.sin(2 * np.pi * frequency * (x[:, 0] + x[:, 1]) + phase)


def region(x: np.ndarray) -> np.ndarray:
  """Returns int64 [n]: the octant, 0 to 7, of the first three features."""
  return (x[:, :3] > 0.5) @ np.array([1, 2, 4])


def regimes_shifted(x: np.ndarray) -> np.ndarray:
  """Friedman-1 plus a smooth correction; each of the eight regions has a different one.

  Region r adds s (√12 w_r·(x - ½) + √2 sin(π u_r·x + φ_r)) / √2 over the five relevant features.
  w_r is a unit vector, u_r is standard normal, φ_r is uniform, and s is the standard deviation of
  Friedman-1. w, u and φ are drawn once from a fixed seed.
  """
  rng = np.random.default_rng(_REGION_SEED)
  w = rng.standard_normal((NUM_REGIONS, 5))
  w /= np.linalg.norm(w, axis=1, keepdims=True)
  u = rng.standard_normal((NUM_REGIONS, 5))
  phase = rng.uniform(0, 2 * np.pi, NUM_REGIONS)
  r, relevant = region(x), x[:, :5]
  line = np.sqrt(12) * np.einsum("nd,nd->n", w[r], relevant - 0.5)
  wave = np.sqrt(2) * np.sin(np.pi * np.einsum("nd,nd->n", u[r], relevant) + phase[r])
  return friedman1(x) + FRIEDMAN1_STD * (line + wave) / np.sqrt(2)


# The corrections of `multi_target`: each has mean zero and unit variance over the cube.
CORRECTIONS: dict[str, Function] = {
  "first_feature_trend_up": lambda x: np.sqrt(12) * (x[:, 0] - 0.5),
  "fourth_feature_trend_down": lambda x: -np.sqrt(12) * (x[:, 3] - 0.5),
  "third_feature_wave": lambda x: np.sqrt(2) * np.sin(4 * np.pi * x[:, 2]),
  "first_second_interaction": lambda x: 12 * (x[:, 0] - 0.5) * (x[:, 1] - 0.5),
  "fifth_feature_step": lambda x: np.where(x[:, 4] > 0.5, 1.0, -1.0),
  "second_feature_bowl": lambda x: np.sqrt(180) * ((x[:, 1] - 0.5) ** 2 - 1 / 12),
}


def _corrected(correction: Function) -> Function:
  return lambda x: friedman1(x) + FRIEDMAN1_STD * correction(x)


TASKS: dict[str, SyntheticTask] = {
  "friedman1": SyntheticTask(10, "friedman1", friedman1, {"friedman1": friedman1_shifted}),
  "friedman2": SyntheticTask(4, "friedman2", friedman2, {"friedman2": friedman2_shifted}),
  "friedman3": SyntheticTask(4, "friedman3", friedman3, {"friedman3": friedman3_shifted}),
  "sines": SyntheticTask(6, "sines", sines, {"sines": sines_shifted}),
  "regimes": SyntheticTask(
    10, "friedman1", friedman1, {"regimes": regimes_shifted}, "heavy_heteroscedastic"
  ),
  "multi_target": SyntheticTask(
    10,
    "friedman1",
    friedman1,
    {name: _corrected(correction) for name, correction in CORRECTIONS.items()},
  ),
}


def synthetic_task(name: str) -> SyntheticTask:
  """Returns a task. Raises UserError for an unknown name; the message lists the known names."""
  if name not in TASKS:
    raise errors.UserError(f"unknown synthetic task {name!r}; known: {', '.join(TASKS)}")
  return TASKS[name]


def target_values(task: SyntheticTask, x: np.ndarray, target_id: np.ndarray) -> np.ndarray:
  """Evaluates the target of each example, selected by `target_id`; returns float64 [n]."""
  values = np.empty(len(x))
  for position, function in enumerate(task.targets.values()):
    target_rows = target_id == position
    values[target_rows] = function(x[target_rows])
  return values
