"""Every level of the ablations against its reference, paired by seed."""

import pandas as pd

from experiments import kept
from qlora_jax.adapters import sizing
from qlora_jax.studies import statistics

TASKS = ("regimes", "multi_target")
# What a level is compared with, where that is not the task's default: the same rank or depth.
REFERENCES = {
  "regimes": {
    "memory=a router a map, rank 6": "rank for atoms=6",
    "memory=a memory a map, rank 6": "rank for atoms=6",
  },
  "multi_target": {
    "memory=a router a map, rank 5": "rank for atoms=5",
    "memory=a memory a map, rank 5": "rank for atoms=5",
  },
}
DEEP, DEEP_REFERENCE = "layers a block", "layers a block=1 of 8"
BUDGETS = {False: 8192, True: 16_384}  # of four and of eight layers


def reference(task: str, method: str) -> str:
  """The method that `method` is compared with."""
  if method.startswith(DEEP):
    return DEEP_REFERENCE
  return REFERENCES[task].get(method, "default")


def levels(rows: pd.DataFrame) -> pd.DataFrame:
  """One row a task and level, in the order of training: its error, and the difference in per cent.

  `p_holm` is corrected over the levels of one factor: of 30 comparisons at once ten seeds, whose
  least p-value is 2 / 2^10, could decide none.
  `matched` says whether its parameters are the budget's within 2 %.
  """
  table = []
  for task in TASKS:
    own = rows[rows["task"] == task]
    if own.empty:
      continue
    errors, chosen = kept.scores(own, "test_mse"), kept.chosen(own)
    for method in chosen.index:
      if method not in errors:
        continue
      factor, _, level = method.partition("=")
      budget = BUDGETS[factor == DEEP]
      values, against = errors[method].to_numpy(), reference(task, method)
      row = {
        "task": task,
        "factor": factor,
        "level": level,
        "reference": against,
        **chosen.loc[method],
        "seeds": len(values),
        "matched": abs(chosen.loc[method, "trainable_params"] / budget - 1) <= sizing.TOLERANCE,
        **kept.ends("mse", statistics.bootstrap_mean(values)),
      }
      if against in errors and against != method:
        other = errors[against].to_numpy()
        row |= kept.ends("percent", statistics.paired_bootstrap_relative(values, other))
        row["p_value"] = statistics.paired_p_value(values, other)
      table.append(row)
  table = pd.DataFrame(table)
  for name in ("percent", "percent_low", "percent_high", "p_value"):
    if name not in table:  # nothing to compare with yet
      table[name] = float("nan")
  compared = table["p_value"].notna()
  table.loc[compared, "p_holm"] = (
    table[compared].groupby(["task", "factor"])["p_value"].transform(statistics.holm)
  )
  return table
