"""The study protocol as checks of its tables: what a study does not meet, one line each.

`docs/protocol.md` gives the reasons. A sweep keeps most of it by itself, as the library gives every
method the same data in the same order, sizes adapters to one budget and chooses on validation. The
checks say what a config leaves open, before anything is trained (`planned`) and afterwards.

  python -m qlora_jax.studies.protocol --workdir=DIR
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import pandas as pd

from qlora_jax import errors
from qlora_jax.adapters import sizing

LEAST_RATES = 7
LEAST_DECADES = 2.0
LEAST_SEEDS = {"regression": 10, "language": 3}

# Not adapters: points of reference, which no budget is meant to match.
REFERENCES = ("none", "full", "full_input")

_SUFFIXES = {"in_prompt": "+prompt", "shuffled": "+shuffled"}  # as in the report's names
_SHOWN = 5  # names in a line
_ROUNDING = 1e-9
_KEY = ["setting", "name"]


@dataclasses.dataclass(frozen=True)
class Rules:
  """What is asked of a study.

  Attributes:
    rates: learning rates of each method's search, at least.
    decades: from the lowest to the highest of them, at least.
    seeds: final seeds of each method, at least.
    tolerance: share by which a method's trainable parameters may differ from the budget.
    budget: trainable parameters that all are matched to; None takes the median of the methods.
  """

  rates: int = LEAST_RATES
  decades: float = LEAST_DECADES
  seeds: int = LEAST_SEEDS["regression"]
  tolerance: float = sizing.TOLERANCE
  budget: int | None = None


def rules_of(config: Mapping[str, Any]) -> Rules:
  """The rules for a study's config: its kind decides the seeds, its adapter the budget."""
  adapter = config.get("adapter") or {}
  return Rules(
    seeds=LEAST_SEEDS["language" if config.get("kind") == "language" else "regression"],
    budget=adapter.get("budget") if adapter.get("rank") is None else None,
  )


def check(runs: pd.DataFrame, rules: Rules) -> list[str]:
  """What a table of runs does not meet, one line a rule; empty where it meets them all.

  Args:
    runs: one row a run, as in `results.parquet` or from `planned`. What a table lacks (steps,
      trainable parameters, validation losses) is not checked.
    rules: what is asked.
  """
  runs = runs.assign(setting=_settings(runs), name=_names(runs))
  runs = runs[runs["name"] != "none"]
  if runs.empty:
    return []
  search, final = (runs[runs["stage"] == stage] for stage in ("search", "final"))
  parts = (
    _searches(search, final, rules),
    _sizes(runs, rules),
    _steps(runs),
    _seeds(search, final, rules),
    _selection(search, final),
  )
  return [line for part in parts for line in part if line]


def _settings(runs: pd.DataFrame) -> pd.Series:
  """The data set of each run in words: a task at one kind and level of noise."""
  found = runs["task"].astype(str)
  for column in ("noise_kind", "noise_level"):
    if column in runs:
      texts = runs[column].astype(object).where(runs[column].notna(), "").astype(str)
      found = found + np.where(texts.isin(["", "none", "0.0"]), "", " " + texts)
  return found


def _names(runs: pd.DataFrame) -> pd.Series:
  """The method of each run with its variant; the report's names have that already."""
  names = runs["arm"].astype(str)
  for column, suffix in _SUFFIXES.items():
    if column in runs:
      given = runs[column].astype("boolean").fillna(False).astype(bool)
      absent = ~names.str.contains(suffix, regex=False)
      names = names + np.where(given & absent, suffix, "")
  return names


def _searches(search: pd.DataFrame, final: pd.DataFrame, rules: Rules) -> Iterator[str]:
  grids = {
    key: sorted(set(rates)) for key, rates in search.groupby(_KEY)["learning_rate"] if len(rates)
  }
  every = [key for key, _ in final.groupby(_KEY)] or list(grids)
  yield _line(
    "no search of the learning rate",
    "the config's own is used",
    [name for setting, name in every if (setting, name) not in grids],
  )
  few = {key: len(grid) for key, grid in grids.items() if len(grid) < rules.rates}
  yield _line(
    "too few learning rates",
    f"{min(few.values(), default=0)}, at least {rules.rates} asked",
    [name for _, name in few],
  )
  spans = {key: float(np.log10(grid[-1] / grid[0])) for key, grid in grids.items() if grid[0] > 0}
  narrow = {key: span for key, span in spans.items() if span < rules.decades - _ROUNDING}
  yield _line(
    "learning rates too close together",
    f"{min(narrow.values(), default=0):.2g} decades, at least {rules.decades:g} asked",
    [name for _, name in narrow],
  )
  by_setting: dict[str, set] = {}
  for (setting, _), grid in grids.items():
    by_setting.setdefault(setting, set()).add(tuple(grid))
  yield _line(
    "different learning rates",
    "all methods of a data set must search the same ones",
    [setting for setting, each in by_setting.items() if len(each) > 1],
  )
  chosen = final.groupby(_KEY)["learning_rate"].first()
  edge = [
    name
    for (setting, name), rate in chosen.items()
    if len(grid := grids.get((setting, name), [])) > 1 and rate in (grid[0], grid[-1])
  ]
  yield _line(
    "learning rate at the edge of the grid",
    f"{len(edge)} of {len(grids)} searches, a rate beyond it may do better",
    edge,
  )


def _sizes(runs: pd.DataFrame, rules: Rules) -> Iterator[str]:
  if "trainable_params" not in runs:
    return
  adapters = runs[~runs["arm"].isin(REFERENCES)]
  off: dict[str, float] = {}
  for _, part in adapters.groupby("setting"):
    sizes = part.groupby("name")["trainable_params"].median()
    budget = rules.budget or sizes.median()
    for name, size in sizes.items():
      share = size / budget - 1
      if abs(share) > max(rules.tolerance + _ROUNDING, abs(off.get(name, 0.0))):
        off[name] = share
  furthest = max(off.values(), key=abs, default=0.0)
  yield _line(
    "trainable parameters not matched",
    f"{100 * furthest:+.3g} %, at most ±{100 * rules.tolerance:g} % asked".replace("-", "−"),
    off,
  )


def _steps(runs: pd.DataFrame) -> Iterator[str]:
  if "steps" not in runs:
    return
  ends = runs.groupby("setting")["steps"].agg(["min", "max"])
  uneven = ends[ends["min"] != ends["max"]]
  yield _line(
    "unequal steps", f"{uneven['min'].min():g} to {uneven['max'].max():g}", list(uneven.index)
  )


def _seeds(search: pd.DataFrame, final: pd.DataFrame, rules: Rules) -> Iterator[str]:
  seeds = {key: set(each) for key, each in final.groupby(_KEY)["seed"]}
  few = {key: len(each) for key, each in seeds.items() if len(each) < rules.seeds}
  yield _line(
    "too few seeds",
    f"{min(few.values(), default=0)}, at least {rules.seeds} asked",
    [name for _, name in few],
  )
  # Another seed means another order of the data: without a common one nothing is paired.
  by_setting: dict[str, list[set]] = {}
  for (setting, _), each in seeds.items():
    by_setting.setdefault(setting, []).append(each)
  yield _line(
    "no seed in common",
    "methods are compared seed by seed",
    [setting for setting, each in by_setting.items() if not set.intersection(*each)],
  )
  used = {key: set(each) for key, each in search.groupby(_KEY)["seed"]}
  yield _line(
    "final seeds not fresh",
    "the search has used them",
    [name for (setting, name), each in seeds.items() if each & used.get((setting, name), set())],
  )


def _selection(search: pd.DataFrame, final: pd.DataFrame) -> Iterator[str]:
  columns = ("validation_mse", "validation_nats")
  column = next((name for name in columns if name in search and search[name].notna().any()), None)
  if column is None:
    return
  means = search.assign(loss=search[column].fillna(np.inf))
  means = means.groupby([*_KEY, "learning_rate"])["loss"].mean().reset_index()
  least = means.loc[means.groupby(_KEY)["loss"].idxmin()].set_index(_KEY)["learning_rate"]
  rates = {key: set(each) for key, each in final.groupby(_KEY)["learning_rate"]}
  yield _line(
    "learning rate not chosen on validation",
    "another one had the least validation loss",
    [key[1] for key, each in rates.items() if key in least.index and each != {least[key]}],
  )


def _line(what: str, detail: str, names: Sequence[str]) -> str:
  """`what: detail (names)`; empty without names."""
  distinct = list(dict.fromkeys(names))
  if not distinct:
    return ""
  more = len(distinct) - _SHOWN
  shown = ", ".join(distinct[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
  return f"{what}: {detail} ({shown})"


def planned(config: ml_collections.ConfigDict, points: list[dict]) -> pd.DataFrame:
  """The runs that a sweep would make, without what only training tells: a table for `check`.

  Args:
    config: of the sweep.
    points: what its `get_hyper` gives.

  Raises:
    errors.UserError: a point's config is wrong.
  """
  # Imported here: with them comes JAX, which a look at a finished study does not need.
  from qlora_jax.studies import study
  from qlora_jax.workloads import workload

  rows = []
  for own, rates in study.expand(config, points):
    instruction = own.instruction
    row = {
      "task": workload.task_name(own),
      "arm": own.get("label") or own.adapter.name,
      "noise_level": own.data.get("noise_level") or 0.0,
      "in_prompt": instruction.get("in_prompt", False),
      "shuffled": instruction.get("shuffled", False),
      "steps": own.optimizer.steps,
      "trainable_params": study.resolve(own, abstract=True).trainable_params,
    }
    rows += [
      {**row, "stage": "search", "seed": seed, "learning_rate": rate}
      for seed, rate in study.search_trials(own, rates)
    ]
    rows += [
      {**row, "stage": "final", "seed": seed, "learning_rate": np.nan}
      for seed in own.protocol.final_seeds
    ]
  return pd.DataFrame(rows)


def read(workdir: str | os.PathLike[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
  """The runs of a study's work directory and its config.

  Raises:
    errors.UserError: a file is missing or damaged, or lacks a column.
  """
  workdir = pathlib.Path(workdir)
  try:
    runs = pd.read_parquet(workdir / "results.parquet")
    config = json.loads((workdir / "study.json").read_text(encoding="utf-8"))["config"]
  except FileNotFoundError as error:
    raise errors.UserError(
      f"--workdir: {error.filename or workdir} does not exist; give the work directory of a study"
    ) from error
  except Exception as error:  # pyarrow raises several unrelated types for a damaged file
    raise errors.UserError(
      f"--workdir: the study in {workdir} cannot be read ({type(error).__name__})"
    ) from error
  missing = {"stage", "task", "arm", "seed", "learning_rate"} - set(runs)
  if missing:
    raise errors.UserError(
      f"--workdir: {workdir / 'results.parquet'} lacks the column(s) {', '.join(sorted(missing))}"
    )
  return runs, config


def main(arguments: Sequence[str] | None = None) -> int:
  """Prints the lines of a study; returns the exit code, 2 for a mistake in what was given."""
  parser = argparse.ArgumentParser(
    prog="python -m qlora_jax.studies.protocol", description=__doc__.split("\n")[0]
  )
  parser.add_argument("--workdir", required=True, help="the study: results.parquet, study.json")
  parser.add_argument("--strict", action="store_true", help="exit with 1 where a rule is not met")
  options = parser.parse_args(arguments)
  try:
    runs, config = read(options.workdir)
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  lines = check(runs, rules_of(config))
  print("\n".join(lines) or "the study meets the protocol")
  return int(options.strict and bool(lines))


if __name__ == "__main__":
  sys.exit(main())
