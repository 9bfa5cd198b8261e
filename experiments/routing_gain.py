"""How much routing gains in a committed study, and the rule for claims about it.

A gain is measured on the trained network: its routing weights are replaced without training again.
The gain is the error (or the nats) with the replaced weights minus the error with the trained
weights. Above zero, routing helps. Arms that were trained separately, such as a static mixture,
differ in all their parameters, so that they do not measure it.
"""

import re

import numpy as np
import pandas as pd

from experiments import committed
from experiments.report import inputs, tables
from qlora_jax.studies import statistics

# Column of a study's results -> what replaces the trained weights.
GAINS = {
  "routing/gain_uniform": "equal weights",
  "routing/gain_mean": "the block's mean weights",
  "routing/gain_other": "the weights of another example",
}
# The gains that a claim needs, by the rules in `configs/bases.py` and `configs/llm.py`, which were
# written before the gains were measured. The other gains are evidence only.
NEEDED = ("routing/gain_uniform", "routing/gain_mean")
NEEDED_IN = {"deciding": ("routing/gain_uniform",)}
NOT_MEASURED = "not tested (routing gain not measured)"
INERT = "not tested (inert routing)"
ALIKE = "not tested (one mixture per block does as well)"


def gains(where: str, results: committed.Results | None = None) -> pd.DataFrame:
  """The gains of an arm: a row per setting and replacement, with `mean`, `low` and `high`.

  The interval is over the final seeds. Where the arm was trained on several frozen networks
  (`ARM/1`, `ARM/2`, ...), it is over the networks' means. A single value has no interval. The table
  is empty where the study has not measured the arm.

  Args:
    where: "STUDY ARM" or "STUDY TASK ARM", as in the study's results. An arm of a language model
      has its variant as a suffix (`queryable_prior+prompt`).
    results: read instead of the committed results of the same name.

  Raises:
    ValueError: there is no study of this name, or it has no such task or arm.
  """
  name, _, rest = where.partition(" ")
  study = results.of(name) if results else committed.results(name)
  if not study.exists:
    raise ValueError(f"routing: {where!r}: no study {name!r} in experiments/results")
  swapped = _swapped(study)
  if not (study.folder / "results.parquet").is_file():
    return _table([])
  final = study.study.stage("final")
  task, _, arm = rest.partition(" ")
  if task in set(final["task"]) and arm:
    final = final[final["task"] == task]
  else:
    arm = rest
  final = final[final["arm"].str.fullmatch(rf"{re.escape(arm)}(/\d+)?")]
  if final.empty:
    raise ValueError(f"routing: {where!r}: {name} has no such task or arm")
  rows = []
  for setting, arm_rows in final.groupby(inputs.SETTING, dropna=False, sort=True):
    for column in GAINS:
      if column in arm_rows and arm_rows[column].notna().any():
        rows.append((" ".join(map(str, setting)), column, *_interval(arm_rows, column)))
  if not rows and swapped is not None:
    arm_rows = swapped[swapped["arm"] == arm]
    rows = [
      ("", column, *_interval(arm_rows, column))
      for column in GAINS
      if column in arm_rows and len(arm_rows)
    ]
  return _table(rows)


def verdict(where: str, supported: str, results: committed.Results | None = None) -> str:
  """The verdict of a claim about routing: `supported` only where its gains lie above zero."""
  measured, needed = gains(where, results), NEEDED_IN.get(where.partition(" ")[0], NEEDED)
  if measured.empty:
    return NOT_MEASURED
  # False also where a single value has no interval, or where a column is missing.
  above = (measured["low"] > 0).groupby(measured["column"]).all()
  if all(above.get(column, False) for column in needed):
    return supported
  return ALIKE if above.get("routing/gain_uniform", False) else INERT


def allowed(where: str, results: committed.Results | None = None) -> bool:
  """Whether a sentence may say that the routing of this arm gains."""
  return verdict(where, "allowed", results) == "allowed"


def in_words(where: str, results: committed.Results | None = None) -> str:
  """The gains as the end of a claim's evidence; empty where none is measured."""
  parts = [
    f"{tables.with_interval(row.mean, row.low, row.high, lambda x: tables.signed(x, 2))}"
    f" with {GAINS[row.column]}"
    for row in gains(where, results).itertuples(index=False)
  ]
  return f"; routing gain {', '.join(parts)}" if parts else ""


def swap(results: committed.Results) -> pd.Series:
  """The swap test of the deciding setting on a language model, one run."""
  return _swapped(results).iloc[0]


def _swapped(results: committed.Results) -> pd.DataFrame | None:
  """Runs trained again with replaced weights, of a study whose runs have no gains."""
  if not (results.folder / "swap.csv").is_file():
    return None
  rows = results.table("swap.csv")
  return rows.assign(**{"routing/gain_uniform": rows["nats_uniform"] - rows["nats"]})


def _interval(rows: pd.DataFrame, column: str) -> tuple[float, float, float]:
  several = rows["arm"].nunique() > 1
  values = rows.groupby("arm")[column].mean() if several else rows[column]
  values = values.dropna().to_numpy()
  if len(values) == 1:
    return (float(values[0]), np.nan, np.nan)
  return tuple(statistics.mean_interval(values))


def _table(rows: list[tuple]) -> pd.DataFrame:
  return pd.DataFrame(rows, columns=["setting", "column", "mean", "low", "high"])
