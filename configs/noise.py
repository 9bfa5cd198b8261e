"""Queryable LoRA against LoRA by kind of noise, noise level and number of training rows.

On `regimes`, where routing wins at the main setting (heavy heteroscedastic noise of level 0.5, all
8,192 rows): does it still with other noise or few rows? And on `friedman1`, where it does not win.
Adapters of 8,192 parameters (2 %).

  python launch.py --config=configs/noise.py:runlocal --workdir=runs/local-noise --sweep
  python launch.py --config=configs/noise.py --workdir=runs/noise --sweep

`python -m experiments noise_and_rows` makes tables and figure.
"""

import ml_collections

from configs import regression
from qlora_jax.data import noise

METHODS = ("lora", "queryable")
LEVELS = (0.25, 0.5, 1.0)
ROWS = (256, 1024, 8192)  # of training; 1,000 steps of 64 are 250, 62 and 8 epochs
OTHER_TASK = "friedman1"  # at the level 0.5 alone


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The base setting; `runlocal` is small enough to look at."""
  return regression.of_study(arg)


def settings(arg: str | None = None) -> list[tuple[str, str, float, int]]:
  """(task, kind of noise, level, training rows), in the order in which they are trained."""
  if arg:
    return [("regimes", noise.KINDS[0], 0.5, rows) for rows in ROWS[:2]]
  first = [
    ("regimes", kind, level, rows)
    for level in (0.5, 0.25, 1.0)
    for rows in ROWS
    for kind in noise.KINDS
  ]
  return first + [(OTHER_TASK, kind, 0.5, rows) for rows in ROWS for kind in noise.KINDS]


def label(method: str, kind: str, level: float, rows: int) -> str:
  """A setting's name in tables."""
  return f"{method}/{kind}/{level:g}/{rows}"


def get_hyper(hyper, arg: str | None = None) -> list[dict]:
  """Settings times methods times rates."""
  points = [
    {
      "data.task": task,
      "data.noise_kind": kind,
      "data.noise_level": level,
      "data.train_rows": rows,
      "adapter.name": method,
      "label": label(method, kind, level, rows),
    }
    for task, kind, level, rows in settings(arg)
    for method in METHODS
  ]
  rates = (3e-3, 1e-2) if arg else regression.LEARNING_RATES
  return hyper.product(points, hyper.sweep("optimizer.learning_rate", rates))
