"""The summary as a table for the terminal; plain text of the same columns where there is none."""

import pathlib

import pandas as pd
import rich.console
import rich.table

from experiments.report import measure, style, tables

_VERDICTS = {"better": "green", "worse": "red", "diverged": "red"}


def show(page: pathlib.Path, console: rich.console.Console | None = None) -> None:
  """Prints the summary that lies beside the report `page`."""
  summary = pd.read_parquet(page.parent / "summary.parquet")
  of = measure.of(summary)
  console = console or rich.console.Console()
  if not console.is_terminal:
    console.width = 120  # a log file has no width
  for (setting, baseline), rows in summary.groupby(["setting", "baseline"], sort=False):
    against = f", compared with {style.method(baseline).label}" if baseline else ""
    table = rich.table.Table(
      title=f"{setting}{against}",
      title_justify="left",
      title_style="bold",
      box=None,
      header_style="dim",
    )
    table.add_column("method", min_width=18, no_wrap=True)
    difference = f"difference, {of.contrast_unit}"
    for name, width in (("trainable", 9), (of.name, 22), (difference, 22)):
      table.add_column(name, min_width=width, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in rows.to_dict("records"):
      color = _VERDICTS.get(row["verdict"], "")
      difference = _ends(row, of.contrast)
      table.add_row(
        row["label"],
        tables.count(row["trainable_params"]),
        _escape(*_ends(row, of.key), tables.value(of)),
        "" if row["arm"] == baseline else _escape(*difference, tables.contrast(of)),
        f"[{color}]{row['verdict']}[/{color}]" if color else row["verdict"],
      )
    console.print(table, "")


def _ends(row: dict, name: str) -> tuple[float, float, float]:
  return row[name], row[f"{name}_low"], row[f"{name}_high"]


def _escape(mean: float, low: float, high: float, formatted) -> str:
  return tables.with_interval(mean, low, high, formatted).replace("[", "\\[")
