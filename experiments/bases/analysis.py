"""Queryable LoRA against LoRA on each frozen network, and over the networks.

Network 0 is the main study's. Where the sweep has not trained it, its comparisons are those of the
stability study: trained again on the machine of the other five, losses recorded every ten steps.
"""

import numpy as np
import pandas as pd

from configs import bases as config
from experiments import kept
from qlora_jax.studies import statistics


def with_main_network(rows: pd.DataFrame, again: pd.DataFrame) -> pd.DataFrame:
  """The rows of all networks; the main study's, if it is missing, from `again` as network 0.

  Args:
    rows: of `configs/bases.py`, methods named `config.label(method, network)`.
    again: of `configs/regression.py:stability`; a task's rows at the other networks' noise count.
  """
  if rows["method"].str.endswith("/0").any():
    return rows
  level = rows.groupby("task")["noise_level"].first()
  own = again[again["noise_level"] == again["task"].map(level)]
  names = [config.label(method, 0) for method in own["method"]]
  return pd.concat([own.assign(method=names), rows], ignore_index=True)


def differences(rows: pd.DataFrame) -> pd.DataFrame:
  """One row per task and network: both errors, the rates chosen, and the difference in per cent.

  The interval is over the seeds of the adapters' training, paired, on this network and at these
  rates. A network that lacks a run of either method is left out.
  """
  table = []
  for task, (ours, theirs) in config.PAIRS.items():
    own = rows[rows["task"] == task]
    errors = kept.scores(own, _column(own)) if len(own) else {}
    for base in sorted({int(name.split("/")[1]) for name in errors}):
      names = [config.label(method, base) for method in (ours, theirs)]
      if not set(names) <= set(errors):
        continue
      a, b = (errors[name].to_numpy() for name in names)
      rates = kept.chosen(own).loc[names, "learning_rate"]
      table.append(
        {
          "task": task,
          "base": base,
          "seeds": len(a),
          "method": ours,
          "baseline": theirs,
          "learning_rate": rates.iloc[0],
          "baseline_learning_rate": rates.iloc[1],
          "error": a.mean(),
          "baseline_error": b.mean(),
          **kept.ends("percent", statistics.paired_relative_interval(a, b)),
        }
      )
  return pd.DataFrame(table)


def pooled(differences: pd.DataFrame) -> pd.DataFrame:
  """One row per task: the mean over its networks in per cent, with Student's interval and Holm's p.

  A network is one value, the logarithm of the ratio of the two methods' mean errors: its search,
  its rates and its seeds are inside. `scatter` is the standard deviation of these values,
  `by_seeds` what the seeds' intervals would make it, both in per cent.
  """
  table = []
  for task, own in differences.groupby("task", sort=False):
    if len(own) < 2:
      continue
    logs = np.log(own["error"] / own["baseline_error"])
    interval, p_value = statistics.student(logs)
    errors = (own["percent_high"] - own["percent_low"]) / (2 * 1.96)
    table.append(
      {
        "task": task,
        "bases": len(own),
        "method": own["method"].iloc[0],
        "baseline": own["baseline"].iloc[0],
        **kept.ends("percent", statistics.Interval(*kept.percent(np.array(interval)))),
        "scatter": 100 * statistics.spread(logs),
        "by_seeds": float(np.sqrt(np.mean(errors**2))),
        "p_value": p_value,
      }
    )
  table = pd.DataFrame(table)
  table["p_holm"] = statistics.holm(table["p_value"])
  table["verdict"] = kept.verdicts(table)
  return table


def _column(rows: pd.DataFrame) -> str:
  """The error free of noise, where the task has one."""
  return "test_mse" if rows["test_mse"].notna().any() else "test_noisy_mse"
