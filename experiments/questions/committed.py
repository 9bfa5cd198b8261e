"""The committed studies, read and summarised once a process."""

import functools
import pathlib

import pandas as pd

from experiments.report import inputs, tables

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"


@functools.cache
def study(name: str) -> inputs.Study:
  """The study in `experiments/results/<name>`."""
  return inputs.read(RESULTS / name)


@functools.cache
def summary(name: str) -> pd.DataFrame:
  """Its summary; `docs/report.md` has the columns."""
  return tables.summarize(study(name))


@functools.cache
def csv(study: str, name: str) -> pd.DataFrame:
  """The table `experiments/results/<study>/<name>.csv`."""
  return pd.read_csv(RESULTS / study / f"{name}.csv")


def markdown(header: list[str], rows: list[list[str]]) -> str:
  """A table in Markdown."""
  rule = ["---"] * len(header)
  return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows]) + "\n"
