"""Tables of the stream study: tidy results on disk, and their summary."""

import pathlib

import numpy as np
import pandas as pd

from experiments import committed, comparisons
from experiments.analysis import stream_quantities as quantities
from qlora_jax.studies import statistics

FILES = {"runs": "runs.csv", "errors": "errors.parquet"}
BASELINE = "LoRA"  # the arm that others are compared with
ALONE = {"LoRA": "LoRA, each alone", "Queryable": "Queryable, each alone"}
Tables = dict[str, pd.DataFrame]  # by the keys of `FILES`


def write(rows: dict[str, list[dict]], results: pathlib.Path) -> None:
  """Writes the rows of `stream_training.run`."""
  results.mkdir(parents=True, exist_ok=True)
  pd.DataFrame(rows["runs"]).to_csv(results / FILES["runs"], index=False, float_format="%.6g")
  errors = pd.DataFrame(rows["errors"]).astype({"mse": "float32", "base_mse": "float32"})
  errors.to_parquet(results / FILES["errors"], index=False)


def read(results: committed.Results) -> Tables:
  """The tidy tables by kind."""
  return {kind: results.table(name) for kind, name in FILES.items()}


def matrices(errors: pd.DataFrame, task: str, arm: str) -> tuple[np.ndarray, np.ndarray]:
  """L [seeds, stages, T] (NaN where it was not measured) and b [seeds, T], seeds ascending."""
  arm_errors = errors[(errors["task"] == task) & (errors["arm"] == arm)]
  grids, base = [], []
  for _, seed_errors in arm_errors.groupby("seed", sort=True):
    grid = seed_errors.pivot(index="after", columns="place", values="mse")
    grids.append(grid.to_numpy(np.float64))
    base.append(seed_errors.groupby("place")["base_mse"].first().to_numpy(np.float64))
  return np.array(grids), np.array(base)


def values(errors: pd.DataFrame, task: str, arm: str) -> dict[str, np.ndarray]:
  """The quantities of an arm, one number per seed [seeds]."""
  grids, base = matrices(errors, task, arm)

  def by_seed(quantity, *others):
    return np.array([quantity(*arrays) for arrays in zip(grids, *others, strict=True)])

  if arm in ALONE.values():
    return {"average error": by_seed(quantities.learned_error)}
  numbers = {"average error": by_seed(quantities.average_error)}
  if grids.shape[1] == 1:  # jointly
    return numbers
  numbers["error when learned"] = by_seed(quantities.learned_error)
  numbers["backward transfer"] = by_seed(quantities.backward_transfer)
  numbers["forward transfer"] = by_seed(quantities.forward_transfer, base)
  alone, _ = matrices(errors, task, ALONE[arm.split(",")[0]])
  if len(alone) == len(grids):
    numbers["intransigence"] = by_seed(quantities.intransigence, map(np.diagonal, alone))
  return numbers


def summarise(tables: Tables) -> pd.DataFrame:
  """Means over the final seeds with 95 % bootstrap intervals, and paired differences to LoRA.

  Returns:
    [task, arm, quantity, mean, low, high, seeds, p]; quantities that end in `BASELINE` are an
    arm's minus sequential LoRA's, with Holm's p over the arms of one quantity and task.
  """
  errors, rows = tables["errors"], []
  for task, arm in errors[["task", "arm"]].drop_duplicates().itertuples(index=False):
    base = values(errors, task, BASELINE)
    for name, numbers in values(errors, task, arm).items():
      rows.append(_row(task, arm, name, statistics.bootstrap_mean(numbers), len(numbers)))
      if arm == BASELINE or len(base.get(name, ())) != len(numbers):
        continue
      interval = statistics.paired_bootstrap(numbers, base[name])
      p = statistics.paired_p_value(numbers, base[name])
      rows.append(_row(task, arm, f"{name} - {BASELINE}", interval, len(numbers), p))
  table = pd.DataFrame(rows)
  compared = table["p"].notna()
  if compared.any():
    # Over the arms of one quantity and task: over all, ten seeds could not show any difference.
    table.loc[compared, "p"] = (
      table[compared].groupby(["task", "quantity"])["p"].transform(statistics.holm)
    )
  return table


def _row(task, arm, quantity, interval, seeds, p=np.nan) -> dict:
  return {
    "task": task,
    "arm": arm,
    "quantity": quantity,
    "mean": interval.mean,
    "low": interval.low,
    "high": interval.high,
    "seeds": seeds,
    "p": p,
  }


def markdown(summary: pd.DataFrame) -> str:
  """One table per task: arms down, quantities across."""
  parts = []
  for task, task_rows in summary.groupby("task", sort=False):
    columns = list(dict.fromkeys(task_rows["quantity"]))
    table = []
    for arm, rows in task_rows.groupby("arm", sort=False):
      cells = {row.quantity: _cell(row) for row in rows.itertuples()}
      table.append([arm, *(cells.get(name, "") for name in columns)])
    parts.append(f"### {task}\n\n" + comparisons.markdown(["arm", *columns], table))
  return "\n".join(parts)


def _cell(row) -> str:
  signed = "" if row.quantity in ("average error", "error when learned") else "+"
  text = "{0:{s}.3f} [{1:{s}.3f}, {2:{s}.3f}]".format(row.mean, row.low, row.high, s=signed)
  return text if np.isnan(row.p) else f"{text}, p {row.p:.2g}"
