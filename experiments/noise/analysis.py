"""Queryable LoRA against LoRA in every setting and over the kinds of noise, paired by seed."""

import numpy as np
import pandas as pd

from experiments import kept
from qlora_jax.data import noise
from qlora_jax.studies import statistics

SETTING = ["task", "noise_kind", "noise_level", "train_rows"]


def differences(rows: pd.DataFrame) -> pd.DataFrame:
  """One row a setting: both errors, and the difference in per cent.

  `p_holm` is corrected over the kinds and rows at one noise level of a task, 15 comparisons: of 45
  at once ten seeds, whose least p-value is 2 / 2^10, could decide none. A setting that lacks a run
  of either method is left out.
  """
  table = []
  for task, own in rows.groupby("task", sort=False):
    errors, chosen = kept.scores(own, "test_mse"), kept.chosen(own)
    for method in errors:
      name, kind, level, count = method.split("/")
      theirs = f"lora/{kind}/{level}/{count}"
      if name == "lora" or theirs not in errors:
        continue
      a, b = errors[method].to_numpy(), errors[theirs].to_numpy()
      table.append(
        {
          "task": task,
          "noise_kind": kind,
          "noise_level": float(level),
          "train_rows": int(count),
          "seeds": len(a),
          "learning_rate": chosen.loc[method, "learning_rate"],
          "lora_learning_rate": chosen.loc[theirs, "learning_rate"],
          "rate_at_edge": bool(chosen.loc[[method, theirs], "rate_at_edge"].any()),
          "error": a.mean(),
          "lora_error": b.mean(),
          **kept.ends("percent", statistics.paired_bootstrap_relative(a, b)),
          "effect_size": statistics.effect_size(a, b),
          "p_value": statistics.paired_p_value(a, b),
        }
      )
  table = pd.DataFrame(table).sort_values(
    SETTING, key=lambda c: -c.eq("regimes") if c.name == "task" else c, ignore_index=True
  )
  table["p_holm"] = table.groupby(["task", "noise_level"])["p_value"].transform(statistics.holm)
  table["verdict"] = kept.verdicts(table)
  return table


def pooled(rows: pd.DataFrame) -> pd.DataFrame:
  """One row a task, noise level and number of rows: the mean over the kinds of noise, in per cent.

  The mean of the logarithms' differences over the kinds, seed by seed: all kinds of a seed share
  their draws, so that seeds and not settings are what is resampled. Holm's p over all rows.
  """
  table = []
  for task, own in rows.groupby("task", sort=False):
    errors = kept.scores(own, "test_mse")
    for level, count in sorted({tuple(name.split("/")[2:]) for name in errors}, key=_numbers):
      pairs = [
        (f"queryable/{kind}/{level}/{count}", f"lora/{kind}/{level}/{count}")
        for kind in noise.KINDS
      ]
      if not {name for pair in pairs for name in pair} <= set(errors):
        continue
      logs = np.mean([np.log(errors[ours] / errors[theirs]) for ours, theirs in pairs], axis=0)
      percent = statistics.Interval(*kept.percent(np.array(statistics.bootstrap_mean(logs))))
      table.append(
        {
          "task": task,
          "noise_level": float(level),
          "train_rows": int(count),
          "seeds": len(logs),
          **kept.ends("percent", percent),
          "effect_size": statistics.effect_size(logs, np.zeros_like(logs)),
          "p_value": statistics.paired_p_value(logs, np.zeros_like(logs)),
        }
      )
  table = pd.DataFrame(table)
  table["p_holm"] = statistics.holm(table["p_value"])
  table["verdict"] = kept.verdicts(table)
  return table


def _numbers(names: tuple[str, ...]) -> tuple[float, ...]:
  return tuple(map(float, names))
