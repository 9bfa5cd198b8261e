"""The numbers of a report: one row for each setting, method and method it is compared with.

Every interval is a bootstrap interval over the seeds of the final runs. A difference is paired: the
two methods saw the same data in the same order at each seed, so that the seed's own luck cancels.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from experiments.report import inputs, style
from qlora_jax.evaluation import statistics

BASELINES: Mapping[str, Sequence[str]] = {
  "": ("lora",),  # every task not named
  "multi_target": ("lora", "lora_input"),
}

_NO_INTERVAL = (math.nan, math.nan, math.nan)


def baselines_of(task: str, baselines: Mapping[str, Sequence[str]] | None = None) -> Sequence[str]:
  """The methods that `task`'s rows are compared with; the empty name stands for other tasks."""
  table = {**BASELINES, **(baselines or {})}
  return table.get(task, table[""])


def summarize(
  study: inputs.Study, baselines: Mapping[str, Sequence[str]] | None = None
) -> pd.DataFrame:
  """The summary table; see `docs/report.md` for its columns.

  Runs that ended without a finite test error are left out of means and differences, counted in
  `failed_runs`, and keep their method from the verdict 'better'.
  """
  rows = []
  search = study.stage("search")
  for setting, runs in study.stage("final").groupby(inputs.SETTING, sort=True):
    present = style.ordered(runs["method"])
    searched = search[(search[inputs.SETTING] == list(setting)).all(axis=1)]
    chosen = [b for b in baselines_of(setting[0], baselines) if b in present] or [""]
    own = {
      key: {
        **dict(zip(inputs.SETTING, setting, strict=True)),
        "setting": study.setting_label(setting),
        **_of_method(key, runs[runs["method"] == key], searched[searched["method"] == key]),
      }
      for key in present
    }
    for baseline in chosen:
      compared = [{**own[key], **_against(baseline, runs, own[key])} for key in present]
      _adjust(compared)
      rows += compared
  return pd.DataFrame(rows)


def _of_method(key: str, runs: pd.DataFrame, searched: pd.DataFrame) -> dict:
  """What a method's rows say without comparing it to another."""
  error = runs["error"].to_numpy()
  failed = _failed(runs, "error").to_numpy()
  error = error[~failed]
  mean, low, high = _interval(statistics.bootstrap_mean, error)
  rates = runs.loc[runs["trainable_params"] > 0, "learning_rate"].dropna()
  rate = rates.mode().iloc[0] if len(rates) else math.nan
  tried = sorted(searched["learning_rate"].dropna().unique())
  row = {
    "method": key,
    "label": style.method(key).label,
    "trainable_params": runs["trainable_params"].median(),
    "learning_rate": rate,
    "rate_at_edge": len(tried) > 1 and rate in (tried[0], tried[-1]),
    "num_seeds": len(runs),
    "failed_runs": int(failed.sum()),
    "noise_free": bool(runs["noise_free"].all()),
    "base_mse": runs["base_mse"].mean(),
    "test_mse": mean,
    "test_mse_low": low,
    "test_mse_high": high,
    "spread": float(statistics.spread(error)) if len(error) > 1 else math.nan,
    "search_runs": len(searched),
    "diverged_share": _failed(searched, "validation_mse").mean() if len(searched) else math.nan,
    "basin_decades": _basin(searched),
  }
  for column in inputs.ROUTER_COLUMNS:
    row[column] = runs.loc[~failed, column].mean()
  return row


def _against(baseline: str, runs: pd.DataFrame, own: dict) -> dict:
  """The paired difference of a method to `baseline` over the seeds that both finished."""
  names = [f"{n}{end}" for n in ("difference", "relative") for end in ("", "_low", "_high")]
  row = dict.fromkeys([*names, "p_value", "p_holm"], math.nan)
  row |= {"baseline": baseline, "num_pairs": 0, "verdict": ""}
  row["baseline_params"] = runs.loc[runs["method"] == baseline, "trainable_params"].median()
  key = own["method"]
  if not baseline or key == baseline:
    return row | {"verdict": "baseline" if baseline else ""}
  finished = runs[~_failed(runs, "error")]
  errors = finished.pivot(index="seed", columns="method", values="error")
  pairs = errors.reindex(columns=[key, baseline]).dropna()
  ours, theirs = pairs[key].to_numpy(), pairs[baseline].to_numpy()
  row["num_pairs"] = len(pairs)
  difference = _interval(statistics.paired_bootstrap, ours, theirs)
  relative = _interval(statistics.paired_bootstrap_relative, ours, theirs)
  row |= dict(zip(names, (*difference, *relative), strict=True))
  if len(pairs) > 1:
    row["p_value"] = float(statistics.paired_p_value(ours, theirs))
  return row | {"verdict": verdict(difference, own["failed_runs"])}


def verdict(difference: Sequence[float], failed_runs: int = 0) -> str:
  """What the interval (mean, low, high) of a difference in error says, in words."""
  if failed_runs:
    return "diverged"
  _, low, high = difference
  if not (math.isfinite(low) and math.isfinite(high)):
    return "too few seeds"
  if high < 0:
    return "better"
  return "worse" if low > 0 else "no difference"


def _adjust(rows: list[dict]) -> None:
  """Holm's correction over the methods compared with one baseline in one setting."""
  tested = [row for row in rows if math.isfinite(row["p_value"])]
  if tested:
    adjusted = statistics.holm([row["p_value"] for row in tested])
    for row, value in zip(tested, adjusted, strict=True):
      row["p_holm"] = float(value)


def _interval(function, *values: np.ndarray) -> tuple[float, float, float]:
  """Mean, low and high; one seed has a mean and no interval."""
  if len(values[0]) == 0:
    return _NO_INTERVAL
  if len(values[0]) == 1:  # the estimate of one seed is that of the same seed twice
    return (float(function(*(np.repeat(v, 2) for v in values)).mean), math.nan, math.nan)
  return tuple(float(end) for end in function(*values))


def _failed(runs: pd.DataFrame, column: str) -> pd.Series:
  return runs["diverged"] | ~np.isfinite(runs[column])


def _basin(searched: pd.DataFrame) -> float:
  """Decades of learning rate within 5 % of the best mean validation error of the search."""
  loss = searched["validation_mse"].where(~_failed(searched, "validation_mse"), math.inf)
  means = loss.groupby(searched["learning_rate"]).mean()
  if len(means) < 2 or not np.isfinite(means).any():
    return math.nan
  return float(statistics.learning_rate_basin(means.index.to_numpy(), means.to_numpy()))


def search_means(searched: pd.DataFrame) -> pd.DataFrame:
  """Mean, least and greatest validation error by learning rate; infinite where a run diverged."""
  loss = searched["validation_mse"].where(~_failed(searched, "validation_mse"), math.inf)
  return loss.groupby(searched["learning_rate"]).agg(["mean", "min", "max"]).sort_index()


def markdown(summary: pd.DataFrame) -> str:
  """The summary as Markdown, one table a setting and baseline."""
  parts = []
  for (setting, baseline), rows in summary.groupby(["setting", "baseline"], sort=False):
    versus = f", compared with {style.method(baseline).label}" if baseline else ""
    parts.append(f"## {setting}{versus}\n")
    parts.append(
      "| method | trainable | learning rate | test MSE [95 % interval] | difference "
      "| difference, % | verdict | spread | basin, decades | diverged in search |"
    )
    parts.append("|---|---:|---:|---:|---:|---:|---|---:|---:|---:|")
    parts += ["| " + " | ".join(_markdown_cells(row)) + " |" for row in rows.to_dict("records")]
    parts.append("")
  return "\n".join(parts)


def _markdown_cells(row: dict) -> list[str]:
  def interval(name: str, formatted) -> str:
    return with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], formatted)

  return [
    row["label"].replace("|", "\\|"),
    count(row["trainable_params"]),
    plain(row["learning_rate"]),
    interval("test_mse", number),
    interval("difference", signed),
    interval("relative", percent),
    row["verdict"],
    number(row["spread"]),
    number(row["basin_decades"], 2),
    share(row["diverged_share"]),
  ]


MISSING = "–"


def number(value: float, digits: int = 3) -> str:
  """`digits` significant digits, without an exponent where that stays short."""
  if not math.isfinite(value):
    return MISSING
  if value == 0:
    return "0"
  if not 1e-4 <= abs(value) < 1e5:
    return f"{value:.{digits - 1}e}"
  decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
  return f"{value:.{decimals}f}"


def plain(value: float) -> str:
  """A number as one would type it: 0.01, 3e-05."""
  return f"{value:g}" if math.isfinite(value) else MISSING


def signed(value: float, digits: int = 3) -> str:
  """A number that shows its sign, with a true minus."""
  if value == 0 or not math.isfinite(value):
    return number(value)
  return ("+" if value > 0 else "−") + number(abs(value), digits)


def percent(value: float) -> str:
  return MISSING if not math.isfinite(value) else f"{value:+.1f}".replace("-", "−")


def count(value: float) -> str:
  return f"{value:,.0f}".replace(",", "\u202f") if math.isfinite(value) else MISSING


def share(value: float) -> str:
  return f"{100 * value:.0f} %" if math.isfinite(value) else MISSING


def with_interval(mean: float, low: float, high: float, formatted=number) -> str:
  """`mean [low, high]`, the brackets left out where there is no interval."""
  if not math.isfinite(mean):
    return MISSING
  if not math.isfinite(low):
    return formatted(mean)
  return f"{formatted(mean)} [{formatted(low)}, {formatted(high)}]"
