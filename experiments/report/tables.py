"""The numbers of a report: one row for each setting, method and method it is compared with.

Every interval is one over the seeds of the final runs: a bootstrap's, or Student's of fewer than
six (`statistics.mean_interval` and its like). A difference is paired: the two methods saw the same
data in the same order at each seed, so that the seed's own luck cancels.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from experiments.report import inputs, measure, style
from qlora_jax.studies import spread, stability, statistics

BASELINES: Mapping[str, Sequence[str]] = {
  "": ("lora", "lora+prompt"),  # every task not named; what a study does not have is passed over
  "multi_target": ("lora", "lora_input"),
}

LEAST_FOR_SPREAD = statistics.FEW  # pairs of seeds below which a ratio of spreads has no interval

_ENDS = ("", "_low", "_high")
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
  rows, of = [], study.measure
  search = study.stage("search")
  for setting, runs in study.stage("final").groupby(inputs.SETTING, sort=True):
    present = style.ordered(runs["arm"])
    searched = search[(search[inputs.SETTING] == list(setting)).all(axis=1)]
    chosen = [b for b in baselines_of(setting[0], baselines) if b in present] or [""]
    label = study.setting_label(setting)
    own = {
      key: {
        **dict(zip(inputs.SETTING, setting, strict=True)),
        "setting": label,
        **_of_method(of, key, runs[runs["arm"] == key], searched[searched["arm"] == key]),
      }
      for key in present
    }
    for baseline in chosen:
      # What has the instruction in its prompt is only compared with what has it there, too.
      apart = "+prompt" not in baseline and any("+prompt" in other for other in chosen)
      alike = [key for key in present if not (apart and "+prompt" in key)]
      compared = [{**own[key], **_against(of, baseline, runs, own[key])} for key in alike]
      _adjust(compared)
      rows += compared
  return pd.DataFrame(rows)


def _of_method(of: measure.Measure, key: str, runs: pd.DataFrame, searched: pd.DataFrame) -> dict:
  """What a method's rows say without comparing it to another."""
  score = runs["score"].to_numpy()
  failed = _failed(runs, "score").to_numpy()
  score = score[~failed]
  mean, low, high = _interval(statistics.mean_interval, score)
  rates = runs.loc[runs["trainable_params"] > 0, "learning_rate"].dropna()
  rate = rates.mode().iloc[0] if len(rates) else math.nan
  tried = sorted(searched["learning_rate"].dropna().unique())
  row = {
    "arm": key,
    "label": style.method(key).label,
    "trainable_params": runs["trainable_params"].median(),
    "learning_rate": rate,
    "rate_at_edge": len(tried) > 1 and rate in (tried[0], tried[-1]),
    "num_seeds": len(runs),
    "failed_runs": int(failed.sum()),
    "noise_free": bool(runs["noise_free"].all()),
    **({of.base: runs[of.base].mean() * of.scale} if of.base else {}),
    of.key: mean,
    f"{of.key}_low": low,
    f"{of.key}_high": high,
    "spread": float(spread.standard_deviation(score)) if len(score) > 1 else math.nan,
    "search_runs": len(searched),
    "diverged_share": _failed(searched, of.validation).mean() if len(searched) else math.nan,
    "basin_decades": _basin(searched, of),
  }
  for also in of.also:
    values = _also(runs[~failed], also).dropna().to_numpy()
    ends = _interval(statistics.mean_interval, values)
    row |= dict(zip((also.key, f"{also.key}_low", f"{also.key}_high"), ends, strict=True))
    if also.base:
      row[also.base] = runs[also.base].mean() * also.scale
  for column in inputs.ROUTER_COLUMNS:
    row[column] = runs.loc[~failed, column].mean()
  return row


def _also(runs: pd.DataFrame, also: measure.Quantity) -> pd.Series:
  return runs[also.key].replace([np.inf, -np.inf], np.nan) * also.scale


def _against(of: measure.Measure, baseline: str, runs: pd.DataFrame, own: dict) -> dict:
  """The paired difference of a method to `baseline` over the seeds that both finished."""
  names = [f"{n}{end}" for n in ("difference", "relative") for end in _ENDS]
  ratios = [f"spread_ratio{end}" for end in _ENDS]
  row = dict.fromkeys(
    [*names, "p_value", "p_holm", "effect_size", "seeds_needed", *ratios], math.nan
  )
  row |= {"baseline": baseline, "num_pairs": 0, "verdict": ""}
  row["baseline_params"] = runs.loc[runs["arm"] == baseline, "trainable_params"].median()
  for also in of.also:
    row |= dict.fromkeys((f"{also.key}_difference{end}" for end in _ENDS), math.nan)
  key = own["arm"]
  if not baseline or key == baseline:
    return row | {"verdict": "baseline" if baseline else ""}
  finished = runs[~_failed(runs, "score")]
  ours, theirs = _pairs(finished, finished["score"], key, baseline)
  row["num_pairs"] = len(ours)
  difference = _interval(statistics.paired_interval, ours, theirs)
  relative = _NO_INTERVAL
  if of.relative:
    relative = _interval(statistics.paired_relative_interval, ours, theirs)
  row |= dict(zip(names, (*difference, *relative), strict=True))
  if len(ours) > 1:
    row["p_value"] = statistics.paired_test(ours, theirs)
    row["effect_size"] = statistics.effect_size(ours, theirs)
    resolution = of.resolution * abs(float(theirs.mean())) if of.relative else of.resolution
    if resolution > 0:
      row["seeds_needed"] = spread.seeds_needed(ours - theirs, resolution)
  if len(ours) >= LEAST_FOR_SPREAD and np.ptp(ours) > 0 and np.ptp(theirs) > 0:
    row |= dict(zip(ratios, spread.paired_spread_ratio(ours, theirs), strict=True))
  for also in of.also:
    ends = _interval(
      statistics.paired_interval, *_pairs(finished, _also(finished, also), key, baseline)
    )
    row |= dict(zip((f"{also.key}_difference{end}" for end in _ENDS), ends, strict=True))
  return row | {"verdict": verdict(difference, own["failed_runs"], of.lower)}


def _pairs(
  runs: pd.DataFrame, values: pd.Series, key: str, baseline: str
) -> tuple[np.ndarray, np.ndarray]:
  """The values of two methods at the seeds that both have."""
  table = runs.assign(value=values).pivot(index="seed", columns="arm", values="value")
  pairs = table.reindex(columns=[key, baseline]).dropna()
  return pairs[key].to_numpy(), pairs[baseline].to_numpy()


def verdict(difference: Sequence[float], failed_runs: int = 0, lower: bool = True) -> str:
  """What the interval (mean, low, high) of a difference says, in words; `lower` is better."""
  if failed_runs:
    return "diverged"
  _, low, high = difference
  if not (math.isfinite(low) and math.isfinite(high)):
    return "too few seeds"
  if low <= 0 <= high:
    return "no difference"
  return "better" if (high < 0) == lower else "worse"


def _adjust(rows: list[dict]) -> None:
  """Holm's correction over the methods compared with one baseline in one setting."""
  tested = [row for row in rows if math.isfinite(row["p_value"])]
  if tested:
    adjusted = statistics.holm([row["p_value"] for row in tested])
    for row, value in zip(tested, adjusted, strict=True):
      row["p_holm"] = float(value)


def by_task(study: inputs.Study) -> pd.DataFrame:
  """Exact match in percent by split and task; a row per setting, method and task of the data.

  The frozen base has its rows as well, `none` and `none+prompt`. Empty where nothing is scored.
  """
  rows, final = [], study.stage("final")
  for (setting, key), runs in final.groupby([inputs.SETTING[0], "arm"], sort=True):
    base = "none+prompt" if "+prompt" in key else "none"
    for column in final.columns:
      prefix = "base_" if column.startswith("base_") else ""
      split, _, rest = column.removeprefix(prefix).partition("/")
      task, _, kind = rest.rpartition("/")
      if split in measure.SPLITS and kind == "accuracy" and runs[column].notna().any():
        rows.append(
          {
            "task": setting,
            "arm": base if prefix else key,
            "split": split,
            "name": task,
            "accuracy": 100 * runs[column].mean(),
            "num_seeds": int(runs[column].notna().sum()),
          }
        )
  columns = ["task", "arm", "split", "name"]
  table = pd.DataFrame(rows, columns=[*columns, "accuracy", "num_seeds"])
  return table.drop_duplicates(columns, ignore_index=True)


def _interval(function, *values: np.ndarray) -> tuple[float, float, float]:
  """Mean, low and high; one seed has a mean and no interval."""
  if len(values[0]) == 0:
    return _NO_INTERVAL
  if len(values[0]) == 1:  # the estimate of one seed is that of the same seed twice
    return (float(function(*(np.repeat(v, 2) for v in values)).mean), math.nan, math.nan)
  return tuple(float(end) for end in function(*values))


def _failed(runs: pd.DataFrame, column: str) -> pd.Series:
  return runs["diverged"] | ~np.isfinite(runs[column])


def _basin(searched: pd.DataFrame, of: measure.Measure) -> float:
  """Decades of learning rate within 5 % of the best mean validation loss of the search."""
  loss = searched[of.validation].where(~_failed(searched, of.validation), math.inf)
  means = loss.groupby(searched["learning_rate"]).mean()
  if len(means) < 2 or not np.isfinite(means).any():
    return math.nan
  return float(stability.learning_rate_basin(means.index.to_numpy(), means.to_numpy()))


def search_means(searched: pd.DataFrame, column: str) -> pd.DataFrame:
  """Mean, least and greatest validation loss by learning rate; infinite where a run diverged."""
  loss = searched[column].where(~_failed(searched, column), math.inf)
  return loss.groupby(searched["learning_rate"]).agg(["mean", "min", "max"]).sort_index()


def markdown(summary: pd.DataFrame) -> str:
  """The summary as Markdown, one table per setting and baseline."""
  parts, of = [], measure.of(summary)
  heads = ["method", "trainable", "learning rate", f"{of.name} [95 % interval]"]
  heads += [also.name for also in of.also]
  heads += ["difference", "difference, %"] if of.relative else ["difference"]
  heads += ["verdict", "spread", "basin, decades", "diverged in search"]
  rules = ["---" if head in ("method", "verdict") else "---:" for head in heads]
  for (setting, baseline), rows in summary.groupby(["setting", "baseline"], sort=False):
    versus = f", compared with {style.method(baseline).label}" if baseline else ""
    parts.append(f"## {setting}{versus}\n")
    parts.append("| " + " | ".join(heads) + " |")
    parts.append("|" + "|".join(rules) + "|")
    parts += ["| " + " | ".join(_markdown_cells(row, of)) + " |" for row in rows.to_dict("records")]
    parts.append("")
  return "\n".join(parts)


def _markdown_cells(row: dict, of: measure.Measure) -> list[str]:
  def interval(name: str, formatted) -> str:
    return with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], formatted)

  return [
    row["label"].replace("|", "\\|"),
    count(row["trainable_params"]),
    plain(row["learning_rate"]),
    *(interval(each.key, value(each)) for each in (of, *of.also)),
    interval("difference", signed if of.relative else contrast(of)),
    *([interval("relative", percent)] if of.relative else []),
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


def value(of: measure.Quantity) -> Callable[[float], str]:
  """How a quantity is written: percentages to a tenth."""
  return number if of.scale == 1 else lambda x: f"{x:.1f}" if math.isfinite(x) else MISSING


def contrast(of: measure.Quantity) -> Callable[[float], str]:
  """How a difference in a quantity is written: percent, or points of percent, to a tenth."""
  return percent if of.scale == 100 or getattr(of, "relative", False) else signed


def probability(value: float) -> str:
  """A p-value to three decimals."""
  return "< 0.001" if value < 0.0005 else f"{value:.3f}"


def count(value: float) -> str:
  return f"{value:,.0f}".replace(",", "\u202f") if math.isfinite(value) else MISSING


def share(value: float) -> str:
  return f"{100 * value:.0f} %" if math.isfinite(value) else MISSING


def over_seeds(values: pd.Series) -> tuple[float, float, float]:
  """Mean and 95 % interval of the finite values; one value has no interval, none is NaN."""
  finite = values[np.isfinite(values)].to_numpy(float)
  if len(finite) < 2:
    return (float(finite[0]) if len(finite) else math.nan, math.nan, math.nan)
  return tuple(statistics.mean_interval(finite))


def with_interval(mean: float, low: float, high: float, formatted=number) -> str:
  """`mean [low, high]`, the brackets left out where there is no interval."""
  if not math.isfinite(mean):
    return MISSING
  if not math.isfinite(low):
    return formatted(mean)
  return f"{formatted(mean)} [{formatted(low)}, {formatted(high)}]"
