"""The summary as a table for the terminal; plain text of the same columns where there is none."""

import pathlib

import pandas as pd
import rich.console
import rich.table

from experiments.report import style, tables

_VERDICTS = {"better": "green", "worse": "red", "diverged": "red"}


def show(page: pathlib.Path, console: rich.console.Console | None = None) -> None:
  """Prints the summary that lies beside the report `page`."""
  summary = pd.read_parquet(page.parent / "summary.parquet")
  console = console or rich.console.Console()
  if not console.is_terminal:
    console.width = 120  # a log file has no width of its own
  for (setting, baseline), rows in summary.groupby(["setting", "baseline"], sort=False):
    against = f", compared with {style.method(baseline).label}" if baseline else ""
    table = rich.table.Table(
      title=f"{setting}{against}", title_justify="left", title_style="bold", box=None,
      header_style="dim",
    )  # fmt: skip
    table.add_column("method", min_width=18, no_wrap=True)
    for name, width in (("trainable", 9), ("test MSE", 22), ("difference, %", 22)):
      table.add_column(name, min_width=width, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in rows.to_dict("records"):
      color = _VERDICTS.get(row["verdict"], "")
      difference = row["relative"], row["relative_low"], row["relative_high"]
      table.add_row(
        row["label"],
        tables.count(row["trainable_params"]),
        _escape(row["test_mse"], row["test_mse_low"], row["test_mse_high"], tables.number),
        "" if row["method"] == baseline else _escape(*difference, tables.percent),
        f"[{color}]{row['verdict']}[/{color}]" if color else row["verdict"],
      )
    console.print(table, "")


def _escape(mean: float, low: float, high: float, formatted) -> str:
  return tables.with_interval(mean, low, high, formatted).replace("[", "\\[")
