"""A study: search the learning rate of every setting, choose on validation, train afresh.

The groups of a sweep are the settings that differ in more than the learning rate. Each has two
stages: `search` (all learning rates x search seeds) and `final` (the chosen rate x fresh seeds).
"""

import contextlib
import datetime
import importlib.metadata
import json
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import pandas as pd

from qlora_jax import errors
from qlora_jax.adapters import factory
from qlora_jax.parallel import processes
from qlora_jax.training import (
  compiled,
  language_loop,
  language_settings,
  loop,
  progress,
  records,
  resume,
  settings,
  workers,
)

RATE = "optimizer.learning_rate"
_PACKAGES = ("jax", "flax", "optax", "numpy")


def is_language(config: ml_collections.ConfigDict) -> bool:
  """Whether a config fine-tunes a language model; it is noisy regression otherwise."""
  return config.get("kind") == "language"


def resolve(config: ml_collections.ConfigDict, abstract: bool = False):
  """The config's checked settings; raises a UserError that names the first field that is wrong.

  Args:
    config: of either kind.
    abstract: whether a language model's shape is enough, where the config names it: no weights.
  """
  if is_language(config):
    return language_settings.resolve(config, abstract)
  return settings.resolve(config)


def rate_of(config: ml_collections.ConfigDict) -> float:
  """The config's own learning rate, or the default of its adapter where it gives none."""
  given = config.optimizer.learning_rate
  return float(factory.learning_rate(config.adapter.name) if given is None else given)


def expand(config: ml_collections.ConfigDict, points: list[dict]) -> list[tuple]:
  """Settings of a sweep: [(config, learning rates)], points that differ in the rate merged."""
  merged: dict[str, tuple] = {}
  for point in points:
    fields = {name: value for name, value in point.items() if name != RATE}
    own = config.copy_and_resolve_references()
    own.update_from_flattened_dict(fields)
    rate = float(point.get(RATE, rate_of(own)))
    merged.setdefault(json.dumps(fields, sort_keys=True), (own, []))[1].append(rate)
  return list(merged.values())


def describe(config: ml_collections.ConfigDict, points: list[dict]) -> list[records.Setting]:
  """The settings of a sweep, in the order of `expand`, as the work directory lists them."""
  return [
    records.Setting(
      records.key(own, rates), name,
      len(search_runs(own, rates))
      + len(own.protocol.final_seeds),
    )
    for (own, rates), name in zip(expand(config, points), records.names(points), strict=True)
  ]  # fmt: skip


def describe_single(config: ml_collections.ConfigDict) -> records.Setting:
  """The config's own run, as the work directory lists it."""
  name = f"{loop.data_name(config)}/{config.adapter.name}"
  return records.Setting(records.key(config, [rate_of(config)]), name, 1)


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
  path = workdir / "study.json"
  plain = resume.plain(config)
  if path.exists():
    stored = json.loads(path.read_text())["config"]
    found = resume.differences(stored, plain, resume.STUDY)
    if found:
      raise errors.UserError(
        f"--workdir: {workdir} belongs to another config: {resume.told(found)};"
        " give the old values or another directory"
      )
    return
  loop.write_json(path, {
    "title": "Queryable LoRA on " + (
      f"{config.model.weights}, {config.data.name}" if is_language(config) else "noisy regression"
    ), "command": command, "commit": _commit(),
    "date": datetime.date.today().isoformat(),
    "devices": ", ".join(sorted({d.device_kind for d in jax.devices()})),
    "versions": {"python": sys.version.split()[0],
                 **{name: importlib.metadata.version(name) for name in _PACKAGES}},
    "wall_seconds": 0.0, "config": plain,
  })  # fmt: skip


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
  groups = workdir / "groups"
  if any(path.is_file() and path.name != "config.json" for path in groups.rglob("*")):
    return
  for folder in (groups, workdir / "settings"):
    shutil.rmtree(folder, ignore_errors=True)
  for name in ("settings.json", "study.json"):
    (workdir / name).unlink(missing_ok=True)
  if remove and not any(workdir.iterdir()):
    workdir.rmdir()


def run(
  config: ml_collections.ConfigDict, points: list[dict], workdir: pathlib.Path, num_workers: int = 1
) -> None:
  """Runs what a sweep has not finished yet; writes the tables after every setting.

  Args:
    config, points: as for `expand`.
    workdir: prepared by `prepare`.
    num_workers: processes that train settings side by side, each on a core of its own.
  """
  pairs = expand(config, points)
  for own, _ in pairs:  # all mistakes are told before anything trains
    resolve(own)
  if processes.is_first():
    records.write_list(workdir, describe(config, points))
  total = sum(len(search_runs(own, rates)) + len(own.protocol.final_seeds) for own, rates in pairs)
  results: list[list[dict]] = [[] for _ in pairs]
  with progress.Display(
    total_points=total, unit="tokens" if is_language(config) else "examples",
    earlier_points=sum(_finished_points(workdir, own, rates) for own, rates in pairs),
  ) as display:  # fmt: skip
    last = time.monotonic()
    for index, (found, trained) in workers.run(
      make_loop, (workdir, is_language(config)), train_setting, pairs, num_workers, display
    ):
      results[index] = found
      if trained:
        now = time.monotonic()
        write_tables(workdir, [each for done in results for each in done], now - last)
        last = now
    write_tables(workdir, [each for done in results for each in done], 0.0)


def _finished_points(workdir: pathlib.Path, config: ml_collections.ConfigDict, rates) -> int:
  """How many of a setting's points earlier processes have finished."""
  runs, best = search_runs(config, rates), rates[0]
  if runs:
    found = _stored(workdir, loop.GroupSpec(config, "search", runs))
    if found is None:
      return 0
    kind = language_loop.Loop if is_language(config) else loop.Loop
    best = choose(found["rows"], kind.objective)
  spec = loop.GroupSpec(
    config, "final", tuple((seed, best) for seed in config.protocol.final_seeds)
  )
  return len(runs) + (0 if _stored(workdir, spec) is None else len(spec.runs))


def _stored(workdir: pathlib.Path, spec: loop.GroupSpec) -> dict | None:
  path = workdir / "groups" / spec.identity / "result.json"
  return json.loads(path.read_text()) if path.exists() else None


def make_loop(display: progress.Display, workdir: pathlib.Path, language: bool):
  """What a process keeps between settings; compiled programs are kept on disk between processes."""
  compiled.enable()
  return (language_loop if language else loop).Loop(workdir, display)


def train_setting(trainer, setting: tuple) -> tuple[list[dict], bool]:
  """One (config, learning rates): the search, the choice, the final runs.

  Returns:
    The results of both stages, and whether anything was trained.
  """
  own, rates = setting
  runs, best, results, searched = search_runs(own, rates), rates[0], [], False
  with _kept(trainer.workdir, records.key(own, rates)) as keeper:
    if runs:
      found, searched = _once(trainer, keeper, loop.GroupSpec(own, "search", runs))
      best = choose(found["rows"], trainer.objective)
      results.append(found)
    spec = loop.GroupSpec(own, "final", tuple((seed, best) for seed in own.protocol.final_seeds))
    last, trained = _once(trainer, keeper, spec)
  compiled.relieve()
  if trained:
    told = trainer.summary(last["rows"])
    trainer.display.log(f"{loop.data_name(own)}/{loop.method_name(own)}: lr {best:g}, {told}")
  return [*results, last], searched or trained


def search_runs(
  config: ml_collections.ConfigDict, rates: list[float]
) -> tuple[tuple[int, float], ...]:
  """(seed, learning rate) of a setting's search; a single rate leaves nothing to choose."""
  seeds = config.protocol.search_seeds
  if config.adapter.name == "none":  # nothing is trained: its error is all there is to know
    return tuple((seed, rates[0]) for seed in seeds)
  if len(rates) == 1:
    return ()
  return tuple((seed, rate) for seed in seeds for rate in rates)


def single(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> tuple[dict, str]:
  """One run of the config's own seed and learning rate: its row, and a line about it."""
  runs = ((config.seed, rate_of(config)),)
  spec = loop.GroupSpec(config, "final", runs)
  language, setting = is_language(config), describe_single(config)
  if processes.is_first():
    records.write_list(workdir, [setting])
  with (
    progress.Display(
      total_points=1, unit="tokens" if language else "examples", stream=processes.terminal()
    ) as display,
    _kept(workdir, setting.key) as keeper,
  ):
    trainer = make_loop(display, workdir, language)
    result, _ = _once(trainer, keeper, spec)
    # Before the run is called done: whoever waits for it finds all of it.
    write_tables(workdir, [result], 0.0)
    if language and processes.is_first():
      language_loop.publish(workdir, result["rows"][0])
  return result["rows"][0], trainer.summary(result["rows"])


def choose(rows: list[dict], column: str = "validation_mse") -> float:
  """The learning rate with the least mean of a column; a diverged run rules its rate out."""
  table = pd.DataFrame(rows)
  table[column] = table[column].fillna(np.inf)
  return float(table.groupby("learning_rate")[column].mean().idxmin())


def gather(workdir: pathlib.Path) -> bool:
  """Writes the tables of what has been trained so far, from the results that processes left.

  For settings that jobs of their own train; the study's wall time becomes the time from the first
  one's start to the last one's end.

  Returns:
    Whether there is any final run.
  """
  read = (records.read(workdir, setting) for setting in records.read_list(workdir))
  found = [record for record in read if record is not None]
  results = [
    json.loads((workdir / "groups" / group / "result.json").read_text())
    for record in found for group in record.groups
  ]  # fmt: skip
  if not results:
    return False
  write_tables(workdir, results, 0.0)
  began, ended = (
    [datetime.datetime.fromisoformat(at) for at in times if at]
    for times in ([each.began for each in found], [each.ended for each in found])
  )
  stored = json.loads((workdir / "study.json").read_text())
  stored["devices"] = ", ".join(sorted({each.devices for each in found if each.groups}))
  stored["wall_seconds"] = (max(ended, default=min(began)) - min(began)).total_seconds()
  loop.write_json(workdir / "study.json", stored)
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
    last = curves.sort_values("step").groupby("run_id")["train_loss"].last()
    rows["train_loss"] = rows["run_id"].map(last)
  tables = {"results": rows, "curves": curves, "routing": routing, "samples": samples}
  for name, table in tables.items():
    if len(table):
      temporary = workdir / f"{name}.parquet.tmp"
      table.to_parquet(temporary, index=False)
      temporary.replace(workdir / f"{name}.parquet")
  rows.to_csv(workdir / "results.csv", index=False)
  path = workdir / "study.json"
  stored = json.loads(path.read_text())
  stored["wall_seconds"] += seconds
  loop.write_json(path, stored)


def _once(trainer, keeper: records.Keeper, spec) -> tuple[dict, bool]:
  result = trainer.finished(spec)
  trained = result is None
  if trained:
    keeper.start(spec.identity, spec.config.optimizer.steps)
    result = trainer.train(spec)
  else:
    trainer.display.skip(spec.label, len(spec.runs))
  keeper.result(spec.identity)
  return result, trained


def _kept(workdir: pathlib.Path, key: str):
  devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
  return records.kept(workdir, key, devices, processes.is_first())


def _commit() -> str:
  root = pathlib.Path(__file__).parent
  command = ["git", "rev-parse", "--short", "HEAD"]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
  return done.stdout.strip()
