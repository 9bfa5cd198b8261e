"""Reads the work directory of a study and checks that a report can be made from it."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.report import measure
from qlora_jax import errors

# A setting is one data set: a task at one kind and level of noise.
SETTING = ["task", "noise_kind", "noise_level"]

ROUTER_COLUMNS = {
  "router/effective_support": "atoms in use",
  "router/entropy": "routing entropy (nats)",
  "router/max_share": "largest atom's share",
  "bound/measured": "measured change",
  "bound/certified": "certified bound",
}
# What the routing gains: the error (or the nats) with other weights less that as trained.
GAIN_COLUMNS = {
  "routing/gain_uniform": "gain over equal weights",
  "routing/gain_mean": "gain over the block's mean weights",
  "routing/gain_other": "gain over another row's weights",
}
# How far the routing moved from where it was drawn.
MOVED_COLUMNS = {
  "routing/support_start": "atoms in use as drawn",
  "routing/moved_weights": "weights moved",
  "routing/moved_keys": "keys moved",
  "routing/moved_atoms": "atoms moved",
  "routing/moved_router": "router moved",
}
_REQUIRED = [
  *["trial_id", "stage", "task", "arm", "seed", "learning_rate", "trainable_params"],
]
_TEXT = ("noise_kind", "diverged")  # of a measure's required columns, those that hold no numbers
_OPTIONAL = ["test_noisy_mse", "steps", "seconds", "atoms", *ROUTER_COLUMNS]
_OPTIONAL += [*GAIN_COLUMNS, *MOVED_COLUMNS]
_CURVES = ["trial_id", "step", "train_loss"]
_SAMPLES = ["trial_id", "task", "instruction", "prompt", "expected", "before", "after"]
_VARIANTS = {"in_prompt": "+prompt", "shuffled": "+shuffled"}  # what a true value adds to a method
_ROUTING = ["trial_id", "task", "arm", "target", "with_instruction", "block", "atom", "weight"]
_INFO = {
  "title": "Study",
  "command": "",
  "commit": "",
  "date": "",
  "devices": "",
  "versions": {},
  "wall_seconds": None,
  "config": {},
}


@dataclasses.dataclass(frozen=True)
class Study:
  """The checked inputs of a report.

  Attributes:
    measure: what the study measures.
    results: one row per run; `method` has the variant as a suffix, see `style.method`; `score` is
      the number that the report compares, in the measure's unit, and `noise_free` says whether it
      is against a noise-free target.
    curves: loss by step and run, or None when the study has none.
    routing: mean routing weights, or None when the study has none.
    samples: answers of final runs before and after training, or None when the study has none.
    info: `study.json` with every key present.
  """

  workdir: pathlib.Path
  measure: measure.Measure
  results: pd.DataFrame
  curves: pd.DataFrame | None
  routing: pd.DataFrame | None
  samples: pd.DataFrame | None
  info: dict[str, Any]

  def stage(self, name: str) -> pd.DataFrame:
    return self.results[self.results["stage"] == name]

  def settings(self) -> list[tuple]:
    """The (task, noise_kind, noise_level) that have final runs, in order."""
    return sorted(self.stage("final")[SETTING].drop_duplicates().itertuples(index=False, name=None))

  def setting_label(self, setting: Sequence) -> str:
    """The task's name, with the noise where the study has more than one for that task."""
    task, kind, level = setting
    same_task = [s for s in self.settings() if s[0] == task]
    name = str(task).replace("_", " ")
    if len(same_task) < 2:
      return name
    kinds = {s[1] for s in same_task}
    noise = f"noise {level:g}" if len(kinds) == 1 else f"{kind} {level:g}".replace("_", " ")
    return f"{name}, {noise}"

  def shown_settings(self, limit: int = 12) -> list[tuple]:
    """The settings that get a panel: all, or the middle noise level of each task if too many."""
    settings = self.settings()
    if len(settings) <= limit:
      return settings
    levels: dict[tuple, list[tuple]] = {}
    for setting in settings:
      levels.setdefault(setting[:2], []).append(setting)
    return [group[len(group) // 2] for group in levels.values()]


def read(workdir: str | os.PathLike[str]) -> Study:
  """Reads `results.parquet`, `study.json` and, where present, `curves`, `routing`, `samples`.

  Raises:
    UserError: a file is missing that must be there, cannot be read, or lacks columns.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise errors.UserError(f"{workdir}: no such directory; give the work directory of a study.")
  results, of = _results(workdir / "results.parquet")
  curves = [*_CURVES, *([of.curve] if of.curve not in _CURVES else [])]
  return Study(
    workdir=workdir,
    measure=of,
    results=results,
    curves=_table(workdir / "curves.parquet", curves, optional=True),
    routing=_table(workdir / "routing.parquet", _ROUTING, optional=True),
    samples=_table(workdir / "samples.parquet", _SAMPLES, optional=True),
    info=_info(workdir / "study.json"),
  )


def _table(path: pathlib.Path, columns: list[str], optional: bool) -> pd.DataFrame | None:
  if not path.is_file():
    if optional:
      return None
    raise errors.UserError(f"{path}: no such file; run the study first, it writes this file.")
  try:
    table = pd.read_parquet(path)
  except Exception as error:  # pyarrow raises several unrelated types for a damaged file
    raise errors.UserError(
      f"{path}: not a readable Parquet file ({type(error).__name__}); run the study again."
    ) from error
  missing = [column for column in columns if column not in table]
  if missing:
    raise errors.UserError(
      f"{path}: lacks the column(s) {', '.join(missing)}; it must have {', '.join(columns)}."
    )
  if table.empty:
    if optional:
      return None
    raise errors.UserError(f"{path}: has no rows; it must have one row per run.")
  return table


def _results(path: pathlib.Path) -> tuple[pd.DataFrame, measure.Measure]:
  table = _table(path, ["trial_id"], optional=False).copy()
  of = measure.of(table)
  table = _table(path, [*_REQUIRED, *of.required], optional=False).copy()
  optional = [*_OPTIONAL, of.key, *(quantity.key for quantity in of.also)]
  optional += [quantity.base for quantity in (of, *of.also) if quantity.base]
  numeric = ["seed", "learning_rate", "trainable_params"]
  numeric += [c for c in of.required if c not in _TEXT] + [c for c in optional if c in table]
  for column in dict.fromkeys(numeric):
    try:
      table[column] = pd.to_numeric(table[column]).astype(float)
    except (ValueError, TypeError) as error:
      raise errors.UserError(f"{path}: column {column} must hold numbers.") from error
  for column in optional:
    if column not in table:
      table[column] = np.nan
  for column, default in (("noise_kind", None), ("noise_level", 0.0), ("diverged", False)):
    if column not in table:
      table[column] = default
  for column in ("trial_id", "stage", "task", "arm"):
    table[column] = table[column].astype(str)
  for column, suffix in _VARIANTS.items():
    if column in table:
      given = table[column].astype("boolean").fillna(False).astype(bool)
      table["arm"] += np.where(given, suffix, "")
  stages = sorted(set(table["stage"]) - {"search", "final"})
  if stages:
    raise errors.UserError(f"{path}: stage {stages[0]!r} is unknown; use 'search' or 'final'.")
  final = table["stage"] == "final"
  if not final.any():
    raise errors.UserError(f"{path}: has no row with stage 'final'; run the final stage first.")
  table["noise_kind"] = (
    table["noise_kind"].astype(object).where(table["noise_kind"].notna(), "none")
  )
  table["noise_level"] = table["noise_level"].fillna(0.0)
  table["diverged"] = table["diverged"].astype("boolean").fillna(False).astype(bool)
  repeated = table[final].duplicated([*SETTING, "arm", "seed"])
  if repeated.any():
    row = table[final][repeated].iloc[0]
    raise errors.UserError(
      f"{path}: two final runs of {row['arm']} on {row['task']} share seed {row['seed']:g} "
      f"(one is {row['trial_id']}); give different methods different labels."
    )
  # Real data has no noise-free target: there the observed one is all there is.
  known = table[of.key].notna().groupby([table[c] for c in SETTING]).transform("any")
  table["noise_free"] = known
  score = table[of.key] * of.scale
  table["score"] = score.where(known, table["test_noisy_mse"])
  return table.reset_index(drop=True), of


def _info(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise errors.UserError(f"{path}: no such file; run the study first, it writes this file.")
  try:
    info = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise errors.UserError(f"{path}: not valid JSON; run the study again.") from error
  if not isinstance(info, dict):
    raise errors.UserError(f"{path}: must hold a JSON object with {', '.join(_INFO)}.")
  return {key: default if info.get(key) is None else info[key] for key, default in _INFO.items()}
