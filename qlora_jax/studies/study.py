"""A study: search the learning rate of every arm, choose on validation, train afresh.

An arm is what a study compares: a config apart from learning rate and seed. It has two stages:
`search` (all learning rates x search seeds) and `final` (the chosen rate x fresh seeds).
"""

import json
import pathlib
import time

import jax
import ml_collections
import numpy as np
import pandas as pd

from qlora_jax import files
from qlora_jax.adapters import factory
from qlora_jax.parallel import processes
from qlora_jax.studies import records, workers
from qlora_jax.studies import workdir as workdir_lib
from qlora_jax.training import compiled, loop, progress, stop
from qlora_jax.workloads import (
  language,
  language_config,
  regression,
  regression_config,
  workload,
)

COHORTS = records.COHORTS
RATE = "optimizer.learning_rate"


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
        workdir_lib.write_tables(
          workdir, [result for done in results for result in done], now - last
        )
        last = now
    workdir_lib.write_tables(workdir, [result for done in results for result in done], 0.0)


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
    workdir_lib.write_tables(workdir, results, 0.0)
    (row,) = results[0]["rows"]
    if is_language(config) and processes.is_first():
      language.publish(workdir, row)
  return row, resources.summary([row])


def choose(rows: list[dict], column: str = "validation_mse") -> float:
  """The learning rate with the least mean of a column; a diverged run rules its rate out."""
  table = pd.DataFrame(rows)
  table[column] = table[column].fillna(np.inf)
  return float(table.groupby("learning_rate")[column].mean().idxmin())


def _kept(workdir: pathlib.Path, key: str):
  devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
  return records.kept(workdir, key, devices, processes.is_first())
