"""Committed results: writing them from a work directory, and reading them once per process."""

import functools
import json
import pathlib
import re
from collections.abc import Sequence

import pandas as pd

from experiments.report import inputs, tables
from qlora_jax import errors
from qlora_jax.training import resume

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"


class Results:
  """The results of one study in a folder.

  Attributes:
    folder: holds `results.parquet` and `study.json`, and the tables that are made from them.
    name: of its folder in `experiments/results`; claims about routing name it.
  """

  def __init__(self, folder: pathlib.Path, name: str | None = None):
    self.folder, self.name = folder, name or folder.name
    self._tables: dict[str, pd.DataFrame] = {}

  def of(self, name: str) -> "Results":
    """The results of another committed study; this one's for its own name."""
    return self if name == self.name else results(name)

  @property
  def exists(self) -> bool:
    return self.folder.is_dir()

  @functools.cached_property
  def study(self) -> inputs.Study:
    """The checked inputs of a report."""
    return inputs.read(self.folder)

  @functools.cached_property
  def summary(self) -> pd.DataFrame:
    """The report's summary; `docs/report.md` lists its columns."""
    return tables.summarize(self.study)

  @property
  def rows(self) -> pd.DataFrame:
    """`results.parquet` as it was written: one row per run."""
    return self.table("results.parquet")

  def table(self, name: str) -> pd.DataFrame:
    """A table by its file name, with the suffix .csv or .parquet.

    Raises:
      errors.UserError: the folder has no such file.
    """
    if name not in self._tables:
      path = self.folder / name
      if not path.is_file():
        raise errors.UserError(f"--results: {self.folder} has no {name}; see --from or --workdir")
      self._tables[name] = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    return self._tables[name]

  def write(self, name: str, table: pd.DataFrame, float_format: str = "%.6g") -> None:
    """Writes a CSV file; `table` gives it as it was written."""
    self.folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(self.folder / name, index=False, float_format=float_format)
    self._tables.pop(name, None)

  def write_text(self, name: str, text: str) -> str:
    """Writes a text file; returns the text."""
    self.folder.mkdir(parents=True, exist_ok=True)
    (self.folder / name).write_text(text)
    return text


@functools.cache
def results(name: str) -> Results:
  """The committed results in `experiments/results/NAME`."""
  return Results(RESULTS / name)


def keep(
  workdirs: pathlib.Path | Sequence[pathlib.Path], target: pathlib.Path, with_curves: bool = False
) -> None:
  """Copies `results.parquet` and `study.json` of a study, without paths of the machine it ran on.

  Args:
    workdirs: work directory of the study. Several work directories hold other settings of the same
      config each, as machines that share a sweep leave them. A folder of kept results is allowed.
    target: folder; made if missing.
    with_curves: whether to copy curves and example answers as well, where the study has them.

  Raises:
    errors.UserError: a work directory has no study or no final run, the configs differ, or two
      work directories hold the same setting.
  """
  workdirs = [workdirs] if isinstance(workdirs, pathlib.Path) else list(workdirs)
  result_tables = [_final_results(workdir) for workdir in workdirs]
  descriptions = [json.loads((workdir / "study.json").read_text()) for workdir in workdirs]
  description = _joined(descriptions, workdirs)
  _check_disjoint(result_tables, workdirs)
  tables_by_name = {"results.parquet": result_tables}
  for name in ("curves.parquet", "samples.parquet") if with_curves else ():
    paths = [workdir / name for workdir in workdirs]
    tables_by_name[name] = [pd.read_parquet(path) for path in paths if path.is_file()]
  target.mkdir(parents=True, exist_ok=True)
  for name, parts in tables_by_name.items():
    if parts:
      rows = pd.concat(parts, ignore_index=True)
      rows.to_parquet(target / name, index=False, compression="zstd")
  (target / "study.json").write_text(json.dumps(description, indent=1) + "\n")


def _final_results(workdir: pathlib.Path) -> pd.DataFrame:
  path = workdir / "results.parquet"
  if not path.is_file():
    raise errors.UserError(f"--from: {workdir} has no results.parquet; run the sweep first")
  rows = pd.read_parquet(path)
  if not (rows["stage"] == "final").any():
    raise errors.UserError(f"--from: {workdir} has no final run yet; continue the sweep")
  return rows


def _check_disjoint(result_tables: list[pd.DataFrame], workdirs: list[pathlib.Path]) -> None:
  owners: dict[tuple[str, str], pathlib.Path] = {}
  for rows, workdir in zip(result_tables, workdirs, strict=True):
    for setting in set(zip(rows["task"], rows["arm"], strict=True)):
      first = owners.setdefault(setting, workdir)
      if first != workdir:
        raise errors.UserError(
          f"--from: {first} and {workdir} both hold {'/'.join(setting)}; give each setting once"
        )


def _joined(descriptions: list[dict], workdirs: list[pathlib.Path]) -> dict:
  """One description: fields that differ are listed, times are added."""
  for description in descriptions:
    description["command"] = re.sub(r"=/\S*/(?=[^/\s]+)", "=runs/", description["command"])
    data = description["config"]["data"]
    data["data_dir"] = "data"
    if data.get("manual_folder"):
      data["manual_folder"] = None
  joined = descriptions[0]
  for description, workdir in zip(descriptions[1:], workdirs[1:], strict=True):
    if differences := resume.differences(joined["config"], description["config"], resume.STUDY):
      raise errors.UserError(
        f"--from: {workdir} has another config than {workdirs[0]}: {resume.described(differences)}"
      )
  for field in ("commit", "date", "devices"):
    joined[field] = ", ".join(dict.fromkeys(description[field] for description in descriptions))
  joined["wall_seconds"] = sum(description["wall_seconds"] for description in descriptions)
  return joined
