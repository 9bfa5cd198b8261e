"""Studies kept under `experiments/results`: what stays of a work directory, and reading it back.

python -m experiments.kept --from=runs/stability --results=experiments/results/stability
"""

import json
import pathlib
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments import command
from qlora_jax import errors
from qlora_jax.studies import statistics
from qlora_jax.training import resume

RESULTS = pathlib.Path(__file__).parent / "results"


def keep(
  parts: pathlib.Path | Sequence[pathlib.Path], target: pathlib.Path, more: bool = False
) -> None:
  """Copies `results.parquet` and `study.json` of a study, without paths of the machine it ran on.

  Args:
    parts: work directory of the study; or several, each with other settings of the same config, as
      machines leave them that share a sweep. A folder that was kept before can be a part.
    target: folder, made if it is not there.
    more: whether curves and example answers are kept, too, where the study has them.

  Raises:
    errors.UserError: a part is no study or has no final run yet, the parts' configs differ, or two
      of them hold the same setting.
  """
  parts = [parts] if isinstance(parts, pathlib.Path) else list(parts)
  tables = [_of_part(workdir) for workdir in parts]
  study = _joined([json.loads((workdir / "study.json").read_text()) for workdir in parts], parts)
  _check_apart(tables, parts)
  extra = {
    name: [pd.read_parquet(workdir / name) for workdir in parts if (workdir / name).is_file()]
    for name in (("curves.parquet", "samples.parquet") if more else ())
  }
  target.mkdir(parents=True, exist_ok=True)
  for name, found in {"results.parquet": tables, **extra}.items():
    if found:
      rows = pd.concat(found, ignore_index=True)
      rows.to_parquet(target / name, index=False, compression="zstd")
  (target / "study.json").write_text(json.dumps(study, indent=1) + "\n")


def _of_part(workdir: pathlib.Path) -> pd.DataFrame:
  path = workdir / "results.parquet"
  if not path.is_file():
    raise errors.UserError(f"--from: {workdir} has no results.parquet; run the sweep first")
  rows = pd.read_parquet(path)
  if not (rows["stage"] == "final").any():
    raise errors.UserError(f"--from: {workdir} has no final run yet; let the sweep go on")
  return rows


def _check_apart(tables: list[pd.DataFrame], parts: list[pathlib.Path]) -> None:
  owner: dict[tuple[str, str], pathlib.Path] = {}
  for rows, workdir in zip(tables, parts, strict=True):
    for setting in set(zip(rows["task"], rows["method"], strict=True)):
      first = owner.setdefault(setting, workdir)
      if first != workdir:
        raise errors.UserError(
          f"--from: {first} and {workdir} both hold {'/'.join(setting)}; give each setting once"
        )


def _joined(studies: list[dict], parts: list[pathlib.Path]) -> dict:
  """One study's description; what differs between its parts is listed, times are added."""
  for study in studies:
    study["command"] = re.sub(r"=/\S*/(?=[^/\s]+)", "=runs/", study["command"])
    data = study["config"]["data"]
    data["data_dir"] = "data"
    if data.get("manual_folder"):
      data["manual_folder"] = None
  joined = studies[0]
  for study, workdir in zip(studies[1:], parts[1:], strict=True):
    if found := resume.differences(joined["config"], study["config"], resume.STUDY):
      raise errors.UserError(
        f"--from: {workdir} is of another config than {parts[0]}: {resume.described(found)}"
      )
  for field in ("commit", "date", "devices"):
    joined[field] = ", ".join(dict.fromkeys(study[field] for study in studies))
  joined["wall_seconds"] = sum(study["wall_seconds"] for study in studies)
  return joined


def read(folder: pathlib.Path) -> pd.DataFrame:
  """The rows of a kept study.

  Raises:
    errors.UserError: there is none.
  """
  path = folder / "results.parquet"
  if not path.is_file():
    raise errors.UserError(f"--results: {folder} has no results.parquet; see --from")
  return pd.read_parquet(path)


def scores(rows: pd.DataFrame, column: str) -> pd.DataFrame:
  """Final errors [seeds, methods] of one task.

  A method with a run that is missing or has no finite error is left out.
  """
  final = rows[rows["stage"] == "final"]
  table = final.pivot(index="seed", columns="method", values=column)
  return table.dropna(axis="columns", how="any")


def chosen(rows: pd.DataFrame) -> pd.DataFrame:
  """By method: the learning rate chosen, whether it ends the grid, and what the adapter is."""
  final = rows[rows["stage"] == "final"].groupby("method", sort=False)
  search = rows[rows["stage"] == "search"].groupby("method")["learning_rate"].agg(["min", "max"])
  table = final[["learning_rate", "rank", "atoms", "trainable_params"]].first()
  table["rate_at_edge"] = search.reindex(table.index).eq(table["learning_rate"], axis=0).any(axis=1)
  table["diverged"] = final["diverged"].sum() if "diverged" in rows else 0
  table["effective_support"] = final["router/effective_support"].mean()
  return table


def percent(log_ratio) -> np.ndarray:
  """A difference of logarithms as per cent more."""
  return 100 * np.expm1(log_ratio)


def ends(name: str, interval: statistics.Interval) -> dict[str, float]:
  """An interval as the columns `name`, `name`_low and `name`_high."""
  return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def verdicts(table: pd.DataFrame) -> list[str]:
  """'better', 'worse' or 'not significant': by `p_holm` and `percent_low` to `percent_high`."""
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


def main(arguments: list[str] | None = None) -> None:
  given = command.of_sweep("kept", __doc__, None).parse_args(arguments)
  if not given.parts or given.results is None:
    raise errors.UserError(
      "--from and --results: give both, the sweep and the folder to keep it in"
    )
  keep(given.parts, given.results, more=True)
  print(f"results: {given.results}")


if __name__ == "__main__":
  command.run(main)
