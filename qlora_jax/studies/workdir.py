"""The work directory of a study: claimed for one config, with tables of its trained trials."""

import contextlib
import datetime
import importlib.metadata
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import ml_collections
import pandas as pd

from qlora_jax import errors, files
from qlora_jax.parallel import processes
from qlora_jax.studies import records
from qlora_jax.training import loop, resume

_OLD_LAYOUT = ("groups", "settings.json")
_PACKAGES = ("jax", "flax", "optax", "numpy")


def prepare(workdir: pathlib.Path, config: ml_collections.ConfigDict, command: str) -> None:
  """Claims a work directory for a config.

  Raises:
    errors.UserError: it cannot be written, or belongs to another config (fields are named).
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / ".writable"
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise errors.UserError(
      f"--workdir: {workdir} cannot be written ({error.strerror}); use another directory"
    ) from error
  old = next((name for name in _OLD_LAYOUT if (workdir / name).exists()), None)
  if old is not None:
    raise errors.UserError(
      f"--workdir: {workdir} holds {old}, which an earlier version of qlora_jax wrote; finish it"
      " with that version or use another directory. Its results.parquet can still be read"
    )
  path = workdir / "study.json"
  plain = resume.plain(config)
  if path.exists():
    stored = json.loads(path.read_text())["config"]
    differing = resume.differences(stored, plain, resume.STUDY)
    if differing:
      raise errors.UserError(
        f"--workdir: {workdir} belongs to another config: {resume.described(differing)};"
        " give the old values or another directory"
      )
    return
  files.write_json(
    path,
    {
      "title": f"Queryable LoRA on {_subject(config)}",
      "command": command,
      "commit": _commit(),
      "date": datetime.date.today().isoformat(),
      "devices": ", ".join(sorted({d.device_kind for d in jax.devices()})),
      "versions": {
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
      },
      "wall_seconds": 0.0,
      "config": plain,
    },
  )


@contextlib.contextmanager
def claimed(workdir: pathlib.Path, config: ml_collections.ConfigDict, command: str):
  """`prepare`; and a mistake that shows before anything is trained leaves the directory as it was.

  Otherwise the mended command would find the directory taken by the mistaken config.
  """
  before = workdir.exists()
  new = not (workdir / "study.json").exists()
  with processes.in_turn():
    prepare(workdir, config, command)
  try:
    yield
  except errors.UserError:
    if new and processes.is_first():
      _release(workdir, remove=not before)
    raise


def _release(workdir: pathlib.Path, remove: bool) -> None:
  cohorts = workdir / records.COHORTS
  if any(path.is_file() and path.name != "config.json" for path in cohorts.rglob("*")):
    return
  for folder in (cohorts, workdir / records.FOLDER):
    shutil.rmtree(folder, ignore_errors=True)
  for name in (records.LIST, "study.json"):
    (workdir / name).unlink(missing_ok=True)
  if remove and not any(workdir.iterdir()):
    workdir.rmdir()


def gather(workdir: pathlib.Path) -> bool:
  """Writes the tables of what has been trained so far, from the results that processes left.

  For arms that separate jobs train; the study's wall time becomes the time from the first
  one's start to the last one's end.

  Returns:
    Whether there is any final run.
  """
  read = (records.read(workdir, arm) for arm in records.read_list(workdir))
  arm_records = [record for record in read if record is not None]
  results = [
    json.loads((workdir / records.COHORTS / cohort / loop.RESULT).read_text())
    for record in arm_records
    for cohort in record.cohorts
  ]
  if not results:
    return False
  write_tables(workdir, results, 0.0)
  began, ended = (
    [datetime.datetime.fromisoformat(at) for at in times if at]
    for times in (
      [record.began for record in arm_records],
      [record.ended for record in arm_records],
    )
  )
  stored = json.loads((workdir / "study.json").read_text())
  stored["devices"] = ", ".join(
    sorted({record.devices for record in arm_records if record.cohorts})
  )
  stored["wall_seconds"] = (max(ended, default=min(began)) - min(began)).total_seconds()
  files.write_json(workdir / "study.json", stored)
  return any(row["stage"] == "final" for result in results for row in result["rows"])


def write_tables(workdir: pathlib.Path, results: list[dict], seconds: float) -> None:
  """Writes results (parquet and CSV), curves, routing, samples; adds to the wall time."""
  if not processes.is_first():
    return
  rows, curves, routing, samples = (
    pd.DataFrame([row for result in results for row in result.get(name, ())])
    for name in ("rows", "curves", "routing", "samples")
  )
  if len(curves):
    last = curves.sort_values("step").groupby("trial_id")["train_loss"].last()
    rows["train_loss"] = rows["trial_id"].map(last)
  tables = {"results": rows, "curves": curves, "routing": routing, "samples": samples}
  for name, table in tables.items():
    if len(table):
      with files.replacing(workdir / f"{name}.parquet") as temporary:
        table.to_parquet(temporary, index=False)
  with files.replacing(workdir / "results.csv") as temporary:
    rows.to_csv(temporary, index=False)
  path = workdir / "study.json"
  stored = json.loads(path.read_text())
  stored["wall_seconds"] += seconds
  files.write_json(path, stored)


def _subject(config: ml_collections.ConfigDict) -> str:
  if config.get("kind") == "language":
    return f"{config.model.weights}, {config.data.name}"
  return "noisy regression"


def _commit() -> str:
  root = pathlib.Path(__file__).parent
  command = ["git", "rev-parse", "--short", "HEAD"]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
  return done.stdout.strip()
