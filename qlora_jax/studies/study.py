"""A study: search the learning rate of every arm, choose on validation, train afresh.

An arm is what a study compares: a config apart from learning rate and seed. It has two stages:
`search` (all learning rates x search seeds) and `final` (the chosen rate x fresh seeds).
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

from qlora_jax import errors, files
from qlora_jax.adapters import factory
from qlora_jax.parallel import processes
from qlora_jax.studies import records, workers
from qlora_jax.training import compiled, loop, progress, resume, stop
from qlora_jax.workloads import (
  language,
  language_config,
  regression,
  regression_config,
  workload,
)

COHORTS = records.COHORTS
RATE = "optimizer.learning_rate"
_OLD_LAYOUT = ("groups", "settings.json")
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
    return language_config.resolve(config, abstract)
  return regression_config.resolve(config)


def unit(config: ml_collections.ConfigDict) -> str:
  """What the speed of training is counted in."""
  return _resources(config).unit


def _resources(config: ml_collections.ConfigDict) -> type[workload.Resources]:
  return language.Resources if is_language(config) else regression.Resources


def rate_of(config: ml_collections.ConfigDict) -> float:
  """The config's own learning rate, or the default of its adapter where it gives none."""
  rate = config.optimizer.learning_rate
  return float(factory.learning_rate(config.adapter.name) if rate is None else rate)


def expand(config: ml_collections.ConfigDict, points: list[dict]) -> list[tuple]:
  """Arms of a sweep: [(config, learning rates)], points that differ in the rate merged."""
  merged: dict[str, tuple] = {}
  for point in points:
    fields = {name: value for name, value in point.items() if name != RATE}
    arm_config = config.copy_and_resolve_references()
    arm_config.update_from_flattened_dict(fields)
    rate = float(point.get(RATE, rate_of(arm_config)))
    merged.setdefault(json.dumps(fields, sort_keys=True), (arm_config, []))[1].append(rate)
  return list(merged.values())


def describe(config: ml_collections.ConfigDict, points: list[dict]) -> list[records.Arm]:
  """The arms of a sweep, in the order of `expand`, as the work directory lists them."""
  return [
    records.Arm(records.key(arm_config, rates), name, _num_trials(arm_config, rates))
    for (arm_config, rates), name in zip(expand(config, points), records.names(points), strict=True)
  ]


def describe_single(config: ml_collections.ConfigDict) -> records.Arm:
  """The config's only trial, as the work directory lists it."""
  name = f"{workload.task_name(config)}/{config.adapter.name}"
  return records.Arm(records.key(config, [rate_of(config)]), name, 1)


def _num_trials(config: ml_collections.ConfigDict, rates: list[float]) -> int:
  return len(search_trials(config, rates)) + len(config.protocol.final_seeds)


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
      "title": "Queryable LoRA on "
      + (
        f"{config.model.weights}, {config.data.name}" if is_language(config) else "noisy regression"
      ),
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
  cohorts = workdir / COHORTS
  if any(path.is_file() and path.name != "config.json" for path in cohorts.rglob("*")):
    return
  for folder in (cohorts, workdir / records.FOLDER):
    shutil.rmtree(folder, ignore_errors=True)
  for name in (records.LIST, "study.json"):
    (workdir / name).unlink(missing_ok=True)
  if remove and not any(workdir.iterdir()):
    workdir.rmdir()


def run(
  config: ml_collections.ConfigDict, points: list[dict], workdir: pathlib.Path, num_workers: int = 1
) -> None:
  """Trains what a sweep has not finished yet; writes the tables after every arm.

  Args:
    config, points: as for `expand`.
    workdir: prepared by `prepare`.
    num_workers: processes that train arms side by side, each on its own core.
  """
  arms = expand(config, points)
  for arm_config, _ in arms:  # all mistakes are reported before anything trains
    resolve(arm_config)
  if processes.is_first():
    records.write_list(workdir, describe(config, points))
  results: list[list[dict]] = [[] for _ in arms]
  with progress.Display(
    total_trials=sum(_num_trials(*arm) for arm in arms),
    unit=unit(config),
    earlier_trials=sum(_finished_trials(workdir, *arm) for arm in arms),
  ) as display:
    last = time.monotonic()
    for index, (arm_results, trained) in workers.run(
      make_resources, (workdir, is_language(config)), train_arm, arms, num_workers, display
    ):
      results[index] = arm_results
      if trained:
        now = time.monotonic()
        write_tables(workdir, [result for done in results for result in done], now - last)
        last = now
    write_tables(workdir, [result for done in results for result in done], 0.0)


def _finished_trials(workdir: pathlib.Path, config: ml_collections.ConfigDict, rates) -> int:
  """How many trials of an arm earlier processes have finished."""
  resources = _resources(config)(workdir, None)
  trials, best = search_trials(config, rates), rates[0]
  count = 0
  for stage in ("search", "final"):
    if stage == "final":
      trials = final_trials(config, best)
    rows = []
    for cohort in resources.cohorts(config, stage, trials):
      result = loop.stored(directory_of(workdir, cohort))
      rows += result["rows"] if result else []
    count += len(rows)
    if stage == "search" and trials:
      if len(rows) < len(trials):
        break
      best = choose(rows, resources.objective)
  return count


def directory_of(workdir: pathlib.Path, cohort: workload.Cohort) -> pathlib.Path:
  """Where a cohort's result, metrics and checkpoints are."""
  return workdir / COHORTS / cohort.identity


def make_resources(
  display: progress.Display, workdir: pathlib.Path, language_model: bool
) -> workload.Resources:
  """What a process keeps between arms; compiled programs are kept on disk between processes."""
  compiled.enable()
  return (language if language_model else regression).Resources(workdir, display)


def train_arm(resources: workload.Resources, arm: tuple) -> tuple[list[dict], bool]:
  """One (config, learning rates): the search, the choice, the final trials.

  Returns:
    The results of both stages, and whether anything was trained.
  """
  config, rates = arm
  trials, best, results, searched = search_trials(config, rates), rates[0], [], False
  with _kept(resources.workdir, records.key(config, rates)) as keeper:
    if trials:
      results, searched = train_stage(resources, keeper, config, "search", trials)
      best = choose([row for result in results for row in result["rows"]], resources.objective)
    final, trained = train_stage(resources, keeper, config, "final", final_trials(config, best))
  compiled.clear_if_needed()
  if trained:
    summary = resources.summary([row for result in final for row in result["rows"]])
    name = f"{workload.task_name(config)}/{workload.arm_name(config)}"
    resources.display.log(f"{name}: lr {best:g}, {summary}")
  return [*results, *final], searched or trained


def train_stage(
  resources: workload.Resources, keeper: records.Keeper, config, stage: str, trials
) -> tuple[list[dict], bool]:
  """The results of an arm's trials, a result per cohort, and whether any was trained."""
  results, trained = [], False
  for cohort in resources.cohorts(config, stage, trials):
    directory = directory_of(resources.workdir, cohort)
    result = loop.stored(directory)
    if result is None:
      stop.check()
      keeper.start(cohort.identity, config.optimizer.steps)
      directory.mkdir(parents=True, exist_ok=True)
      files.write_json(
        directory / "config.json",
        {**config.to_dict(), "stage": stage, "trials": cohort.trials},
      )
      training = resources.open(cohort, directory)
      result = loop.train(training, resources.saving(cohort, directory), resources.display)
      trained = True
    else:
      resources.display.skip(cohort.label, len(cohort.trials))
    keeper.result(cohort.identity)
    results.append(result)
  return results, trained


def search_trials(
  config: ml_collections.ConfigDict, rates: list[float]
) -> tuple[workload.Trial, ...]:
  """The trials of an arm's search; a single rate leaves nothing to choose."""
  seeds = config.protocol.search_seeds
  if config.adapter.name == "none":  # nothing is trained: its error is all there is to know
    return tuple(workload.Trial(seed, rates[0]) for seed in seeds)
  if len(rates) == 1:
    return ()
  return tuple(workload.Trial(seed, rate) for seed in seeds for rate in rates)


def final_trials(config: ml_collections.ConfigDict, rate: float) -> tuple[workload.Trial, ...]:
  """The trials of an arm at the chosen rate, on seeds that the search has not used."""
  return tuple(workload.Trial(seed, rate) for seed in config.protocol.final_seeds)


def single(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> tuple[dict, str]:
  """The config's own seed and learning rate as one trial: its row, and a line about it."""
  trial = workload.Trial(config.seed, rate_of(config))
  arm = describe_single(config)
  if processes.is_first():
    records.write_list(workdir, [arm])
  with (
    progress.Display(total_trials=1, unit=unit(config), stream=processes.terminal()) as display,
    _kept(workdir, arm.key) as keeper,
  ):
    resources = make_resources(display, workdir, is_language(config))
    results, _ = train_stage(resources, keeper, config, "final", (trial,))
    # Before the trial is called done: whoever waits for it finds all of it.
    write_tables(workdir, results, 0.0)
    (row,) = results[0]["rows"]
    if is_language(config) and processes.is_first():
      language.publish(workdir, row)
  return row, resources.summary([row])


def choose(rows: list[dict], column: str = "validation_mse") -> float:
  """The learning rate with the least mean of a column; a diverged run rules its rate out."""
  table = pd.DataFrame(rows)
  table[column] = table[column].fillna(np.inf)
  return float(table.groupby("learning_rate")[column].mean().idxmin())


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
    json.loads((workdir / COHORTS / cohort / loop.RESULT).read_text())
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
    last = curves.sort_values("step").groupby("run_id")["train_loss"].last()
    rows["train_loss"] = rows["run_id"].map(last)
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


def _kept(workdir: pathlib.Path, key: str):
  devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
  return records.kept(workdir, key, devices, processes.is_first())


def _commit() -> str:
  root = pathlib.Path(__file__).parent
  command = ["git", "rev-parse", "--short", "HEAD"]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
  return done.stdout.strip()
