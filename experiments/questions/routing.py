"""How much routing gains in a committed study, and the rule for claims about it.

A gain is measured on the trained network: its routing weights are replaced, nothing is trained
again, and the gain is the error (or the nats) with the replaced weights minus that of the weights
as trained. Above zero, routing helps. Arms that were trained apart, such as a static mixture,
differ in all their parameters, so that they do not measure it.
"""

import re

import numpy as np
import pandas as pd

from experiments.questions import committed
from experiments.report import inputs, tables
from qlora_jax.studies import statistics

# Column of a study's results -> what replaces the trained weights.
GAINS = {
  "routing/gain_uniform": "equal weights",
  "routing/gain_mean": "the block's mean weights",
  "routing/gain_other": "the weights of another example",
}
# The gains that a claim needs, by the rules in `configs/bases.py` and `configs/llm.py`, which were
# written before the gains were measured. The others are evidence.
NEEDED = ("routing/gain_uniform", "routing/gain_mean")
NEEDED_IN = {"deciding": ("routing/gain_uniform",)}
NOT_MEASURED = "not tested (routing gain not measured)"
INERT = "not tested (inert routing)"
ALIKE = "not tested (one mixture per block does as well)"


def gains(where: str) -> pd.DataFrame:
  """The gains of an arm: a row per setting and replacement, with `mean`, `low` and `high`.

  The interval is over the final seeds; where the arm was trained on several frozen networks
  (`ARM/1`, `ARM/2`, ...), over the networks' means. One value has no interval. Empty where the
  study has not measured the arm.

  Args:
    where: "STUDY ARM" or "STUDY TASK ARM", as in the study's results; of a language model an arm
      has its variant as a suffix (`queryable_prior+prompt`).

  Raises:
    ValueError: there is no study of this name, or it has no such task or arm.
  """
  study, _, rest = where.partition(" ")
  if not (committed.RESULTS / study).is_dir():
    raise ValueError(f"routing: {where!r}: no study {study!r} in experiments/results")
  swapped = _swapped(study)
  if not (committed.RESULTS / study / "results.parquet").is_file():
    return _table([])
  final = committed.study(study).stage("final")
  task, _, arm = rest.partition(" ")
  if task in set(final["task"]) and arm:
    final = final[final["task"] == task]
  else:
    arm = rest
  final = final[final["method"].str.fullmatch(rf"{re.escape(arm)}(/\d+)?")]
  if final.empty:
    raise ValueError(f"routing: {where!r}: {study} has no such task or arm")
  rows = []
  for setting, own in final.groupby(inputs.SETTING, dropna=False, sort=True):
    for column in GAINS:
      if column in own and own[column].notna().any():
        rows.append((" ".join(map(str, setting)), column, *_interval(own, column)))
  if not rows and swapped is not None:
    own = swapped[swapped["method"] == arm]
    rows = [("", column, *_interval(own, column)) for column in GAINS if column in own and len(own)]
  return _table(rows)


def verdict(where: str, supported: str) -> str:
  """The verdict of a claim about routing: `supported` only where its gains lie above zero."""
  found, needed = gains(where), NEEDED_IN.get(where.partition(" ")[0], NEEDED)
  if found.empty:
    return NOT_MEASURED
  # False also where one value has no interval, or where a column is missing.
  above = (found["low"] > 0).groupby(found["column"]).all()
  if all(above.get(column, False) for column in needed):
    return supported
  return ALIKE if above.get("routing/gain_uniform", False) else INERT


def allowed(where: str) -> bool:
  """Whether a sentence may say that the routing of this arm gains."""
  return verdict(where, "allowed") == "allowed"


def told(where: str) -> str:
  """The gains in words, to end the evidence of a claim with; empty where there are none."""
  parts = [
    f"{tables.with_interval(row.mean, row.low, row.high, lambda x: tables.signed(x, 2))}"
    f" with {GAINS[row.column]}"
    for row in gains(where).itertuples(index=False)
  ]
  return f"; routing gain {', '.join(parts)}" if parts else ""


def swap() -> pd.Series:
  """The swap test of the deciding setting on a language model, one run."""
  return _swapped("induction").iloc[0]


def _swapped(study: str) -> pd.DataFrame | None:
  """Weights that were replaced in runs trained again, where the study's own have no gains."""
  path = committed.RESULTS / study / "swap.csv"
  if not path.is_file():
    return None
  rows = pd.read_csv(path)
  return rows.assign(**{"routing/gain_uniform": rows["nats_uniform"] - rows["nats"]})


def _interval(own: pd.DataFrame, column: str) -> tuple[float, float, float]:
  values = own.groupby("method")[column].mean() if own["method"].nunique() > 1 else own[column]
  values = values.dropna().to_numpy()
  if len(values) == 1:
    return (float(values[0]), np.nan, np.nan)
  return tuple(statistics.mean_interval(values))


def _table(rows: list[tuple]) -> pd.DataFrame:
  return pd.DataFrame(rows, columns=["setting", "column", "mean", "low", "high"])
