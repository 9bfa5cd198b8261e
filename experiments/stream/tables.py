"""The stream study's tables: tidy results on disk, and the summary that they give."""

import pathlib

import numpy as np
import pandas as pd

from experiments.stream import quantities
from qlora_jax.studies import statistics

FILES = {"runs": "runs.csv", "errors": "errors.parquet"}
BASELINE = "LoRA"  # the arm that others are compared with
ALONE = {"LoRA": "LoRA, each alone", "Queryable": "Queryable, each alone"}


def write(found: dict[str, list[dict]], results: pathlib.Path) -> None:
  """Writes the rows of `train.run`."""
  results.mkdir(parents=True, exist_ok=True)
  pd.DataFrame(found["runs"]).to_csv(results / FILES["runs"], index=False, float_format="%.6g")
  errors = pd.DataFrame(found["errors"]).astype({"mse": "float32", "base_mse": "float32"})
  errors.to_parquet(results / FILES["errors"], index=False)


def read(results: pathlib.Path) -> dict[str, pd.DataFrame]:
  """The tidy tables by kind."""
  return {
    "runs": pd.read_csv(results / FILES["runs"]),
    "errors": pd.read_parquet(results / FILES["errors"]),
  }


def matrices(errors: pd.DataFrame, task: str, arm: str) -> tuple[np.ndarray, np.ndarray]:
  """L [seeds, stages, T] (NaN where it was not measured) and b [seeds, T], seeds ascending."""
  own = errors[(errors["task"] == task) & (errors["arm"] == arm)]
  found, base = [], []
  for _, each in own.groupby("seed", sort=True):
    grid = each.pivot(index="after", columns="place", values="mse")
    found.append(grid.to_numpy(np.float64))
    base.append(each.groupby("place")["base_mse"].first().to_numpy(np.float64))
  return np.array(found), np.array(base)


def values(errors: pd.DataFrame, task: str, arm: str) -> dict[str, np.ndarray]:
  """Every quantity that an arm has, one number a seed [seeds]."""
  found, base = matrices(errors, task, arm)
  if arm in ALONE.values():
    return {"average error": np.array([quantities.learned_error(each) for each in found])}
  made = {"average error": np.array([quantities.average_error(each) for each in found])}
  if found.shape[1] == 1:  # jointly
    return made
  made["error when learned"] = np.array([quantities.learned_error(each) for each in found])
  made["backward transfer"] = np.array([quantities.backward_transfer(each) for each in found])
  made["forward transfer"] = np.array(
    [quantities.forward_transfer(each, own) for each, own in zip(found, base, strict=True)]
  )
  alone, _ = matrices(errors, task, ALONE[arm.split(",")[0]])
  if len(alone) == len(found):
    made["intransigence"] = np.array(
      [
        quantities.intransigence(each, np.diagonal(own))
        for each, own in zip(found, alone, strict=True)
      ]
    )
  return made


def summarise(found: dict[str, pd.DataFrame]) -> pd.DataFrame:
  """Means over the final seeds with 95 % bootstrap intervals, and differences to LoRA by pairs.

  Returns:
    [task, arm, quantity, mean, low, high, seeds, p]; quantities that end in `BASELINE` are an
    arm's minus sequential LoRA's, with Holm's p over the arms of one quantity and task.
  """
  errors, rows = found["errors"], []
  for task, arm in errors[["task", "arm"]].drop_duplicates().itertuples(index=False):
    base = values(errors, task, BASELINE)
    for name, own in values(errors, task, arm).items():
      rows.append(_row(task, arm, name, statistics.bootstrap_mean(own), len(own)))
      if arm == BASELINE or len(base.get(name, ())) != len(own):
        continue
      interval = statistics.paired_bootstrap(own, base[name])
      p = statistics.paired_p_value(own, base[name])
      rows.append(_row(task, arm, f"{name} - {BASELINE}", interval, len(own), p))
  table = pd.DataFrame(rows)
  compared = table["p"].notna()
  if compared.any():
    # Over the arms of one quantity and task: of all at once ten seeds could decide none.
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
  """One table a task: arms down, quantities across."""
  lines = []
  for task in dict.fromkeys(summary["task"]):
    own = summary[summary["task"] == task]
    columns = list(dict.fromkeys(own["quantity"]))
    lines += ["", f"### {task}", "", "| " + " | ".join(["arm", *columns]) + " |"]
    lines.append("| " + " | ".join(["---"] * (len(columns) + 1)) + " |")
    for arm, rows in own.groupby("arm", sort=False):
      cells = {row.quantity: _cell(row) for row in rows.itertuples()}
      lines.append("| " + " | ".join([arm, *(cells.get(name, "") for name in columns)]) + " |")
  return "\n".join(lines[1:]) + "\n"


def _cell(row) -> str:
  signed = "" if row.quantity in ("average error", "error when learned") else "+"
  text = "{0:{s}.3f} [{1:{s}.3f}, {2:{s}.3f}]".format(row.mean, row.low, row.high, s=signed)
  return text if np.isnan(row.p) else f"{text}, p {row.p:.2g}"
