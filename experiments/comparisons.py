"""Comparisons of arms over the final seeds, and how tables write their numbers."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from qlora_jax.studies import statistics


def scores(rows: pd.DataFrame, column: str) -> pd.DataFrame:
  """Final scores [seeds, methods] of one task.

  A method is left out if one of its runs is missing or has no finite score.
  """
  final = rows[rows["stage"] == "final"]
  table = final.pivot(index="seed", columns="arm", values=column)
  return table.dropna(axis="columns", how="any")


def chosen(rows: pd.DataFrame) -> pd.DataFrame:
  """By method: the chosen learning rate, whether it ends the grid, and the adapter's size."""
  final = rows[rows["stage"] == "final"].groupby("arm", sort=False)
  search = rows[rows["stage"] == "search"].groupby("arm")["learning_rate"].agg(["min", "max"])
  table = final[["learning_rate", "rank", "atoms", "trainable_params"]].first()
  table["rate_at_edge"] = search.reindex(table.index).eq(table["learning_rate"], axis=0).any(axis=1)
  table["diverged"] = final["diverged"].sum() if "diverged" in rows else 0
  table["effective_support"] = final["router/effective_support"].mean()
  return table


def percent(log_ratio) -> np.ndarray:
  """A difference of logarithms as a change in per cent."""
  return 100 * np.expm1(log_ratio)


def columns_of(name: str, interval: statistics.Interval) -> dict[str, float]:
  """An interval as the columns `name`, `name`_low and `name`_high."""
  return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def verdicts(table: pd.DataFrame) -> list[str]:
  """'better', 'worse' or 'not significant', from `p_holm` and `percent_low` to `percent_high`."""
  return [
    "not significant"
    if p >= statistics.SIGNIFICANCE or low <= 0 <= high
    else "better"
    if high < 0
    else "worse"
    for p, low, high in zip(
      table["p_holm"], table["percent_low"], table["percent_high"], strict=True
    )
  ]


def interval(row, name: str = "percent", form: str = "+.1f", unit: str = " %") -> str:
  """`mean [low, high]` of the columns that `columns_of` makes, with hyphens as minus signs."""
  row = row._asdict() if hasattr(row, "_asdict") else row
  mean, low, high = (f"{row[f'{name}{end}']:{form}}" for end in ("", "_low", "_high"))
  return f"{mean}{unit} [{low}, {high}]"


def signed_interval(row, name: str = "percent", form: str = "+.1f", unit: str = " %") -> str:
  """`interval` with typographic minus signs, as the documents have it."""
  return typographic(interval(row, name, form, unit))


def mean_interval(row, digits: int = 2) -> str:
  """`mean [low, high]` of the columns `mean`, `low` and `high`."""
  mean, low, high = (f"{row[name]:.{digits}f}" for name in ("mean", "low", "high"))
  return typographic(f"{mean} [{low}, {high}]")


def typographic(text: str) -> str:
  """Numbers with minus signs instead of hyphens."""
  return text.replace("-", "−")


def markdown(header: str | Sequence[str], rows: Iterable[str | Sequence[str]]) -> str:
  """A table in Markdown.

  Args:
    header: the cells, or a string with ` | ` between them; rows: likewise.
  """
  lines = [row if isinstance(row, str) else " | ".join(row) for row in (header, *rows)]
  rule = " | ".join(["---"] * (1 + lines[0].count(" | ")))
  return "".join(f"| {line} |\n" for line in (lines[0], rule, *lines[1:]))
