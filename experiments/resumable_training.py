"""Training in resumable units of work, on parts of tasks and from given weights.

It is for studies that `launch.py --sweep` cannot train. A unit of work is a named function whose
result JSON can hold. `Bench.once` runs it once per work directory, so that a stopped study
continues at the first missing unit.
"""

import functools
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence

import jax
import ml_collections
import numpy as np

from experiments import study as study_lib
from qlora_jax import config_files, files
from qlora_jax.adapters import config as adapter_config
from qlora_jax.data import functions, pipeline
from qlora_jax.models import mlp
from qlora_jax.studies import study
from qlora_jax.studies import workdir as workdir_lib
from qlora_jax.training import checkpoint, compiled, loop, progress
from qlora_jax.training import optimizer as optimizer_lib
from qlora_jax.training import step as step_lib
from qlora_jax.typing import PyTree
from qlora_jax.workloads import cohort_program, feed, regression, regression_config


def prepare(
  work: study_lib.Work, unit_count: Callable[[list[dict]], int]
) -> tuple["Bench", list[dict]]:
  """A bench in the work directory, and the points of the config's sweep.

  Args:
    unit_count: gives the number of units for the points.
  """
  config, points = config_files.config(work.config), config_files.points(work.config)
  workdir_lib.prepare(work.workdir, config, work.command)
  return Bench(config, work.workdir, unit_count(points), work.limit), points


def parts(task: str, arrays: pipeline.Arrays) -> np.ndarray:
  """The part int [n] of a task that each example belongs to; names: `part_names`.

  The parts of `multi_target` are its targets. The parts of `regimes` are the octants of the first
  three standardised features. They are its regions, except that they meet at the mean of the
  source's rows instead of 1/2.
  """
  if task == "regimes":
    return (arrays.features[:, :3] > 0) @ np.array([1, 2, 4])
  return arrays.target_id


def part_names(task: str) -> tuple[str, ...]:
  """Names of a task's parts, in order."""
  if task == "regimes":
    return tuple(f"region {index}" for index in range(functions.NUM_REGIONS))
  return pipeline.describe_task(task).target_names


class Bench:
  """Trains groups of runs on parts of tasks in one work directory.

  Attributes:
    config: the experiment's config, whose fields a call may override.
    workdir: prepared by `workdir_lib.prepare`.
    left: number of units that may still be made; None for all.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    total: int,
    limit: int | None = None,
  ):
    compiled.enable()
    self.config, self.workdir, self.left = config, workdir, limit
    self._total, self._done = total, 0
    self._unadapted: dict[tuple, np.ndarray] = {}
    self._display = progress.Display(total_trials=total, plain=True)
    self._resources = regression.Resources(workdir, self._display)
    self._unit, self._trainings = "", 0  # names the checkpoints of a training

  def once(self, name: str, make: Callable[[], dict]) -> dict:
    """The result of a unit of work, from the work directory or made now.

    It prints a line for a unit that is made now. It gives {} for a missing unit if the limit is
    reached.
    """
    path = self.workdir / "units" / f"{name}.json"
    self._done += 1
    if path.exists():
      return json.loads(path.read_text())
    if self.left is not None:
      if not self.left:
        return {}
      self.left -= 1
    began = time.monotonic()
    self._unit, self._trainings = name, 0
    result = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, result)
    took = time.monotonic() - began
    print(f"{self._done}/{self._total} {name}: {took:.0f} s", file=sys.stderr, flush=True)
    return json.loads(path.read_text())

  def with_fields(self, fields: dict) -> ml_collections.ConfigDict:
    """The experiment's config with dotted fields replaced."""
    config = self.config.copy_and_resolve_references()
    config.update_from_flattened_dict(fields)
    return config

  def program(
    self, config: ml_collections.ConfigDict, steps: int | None = None, frozen: Sequence[str] = ()
  ) -> cohort_program.Program:
    """The compiled functions of a config, with other steps and frozen parameter groups."""
    resolved = regression_config.resolve(config)
    fields = {**vars(resolved.optimizer), "frozen": tuple(frozen)}
    if steps is not None:
      fields["steps"] = steps
    return cohort_program.program(resolved.network, optimizer_lib.OptimizerConfig(**fields))

  def base(self, config: ml_collections.ConfigDict) -> PyTree:
    return self._resources.base(config)

  def arrays(self, config: ml_collections.ConfigDict, seed: int) -> dict[str, pipeline.Arrays]:
    """All splits of a seed."""
    return _arrays(
      config.data.task,
      seed,
      config.data.data_dir,
      config.model.inputs,
      config.data.noise_kind,
      config.data.noise_level,
      config.data.train_rows,
    )

  def data(
    self,
    config: ml_collections.ConfigDict,
    program: cohort_program.Program,
    trained: dict[int, Sequence[int] | None],
  ) -> feed.Feed:
    """The data of runs, by seed.

    Args:
      trained: seed to the parts that its runs are trained on; None for all parts.
    """
    splits = {}
    for seed, wanted in trained.items():
      splits[seed] = dict(self.arrays(config, seed))
      if wanted is not None:
        part = parts(config.data.task, splits[seed]["train"])
        splits[seed]["train"] = splits[seed]["train"].take(np.isin(part, list(wanted)))
    table = self._resources.instructions(config, program.model.adapter)
    optimizer = program.optimizer
    return feed.Feed(splits, table, optimizer.batch_size, optimizer.steps)

  def train(
    self,
    program: cohort_program.Program,
    states: step_lib.TrainState,
    frozen: step_lib.Frozen,
    data: feed.Feed,
    trials: Sequence[tuple[int, float]],
  ) -> step_lib.TrainState:
    """Trains from given states to the last step; a stopped training continues where it was."""
    self._trainings += 1
    folder = self.workdir / "trainings" / f"{self._unit}, {self._trainings}"
    training = regression.Training(
      self._unit, program, data, seeds_of(trials), seed_rows(trials), states, frozen
    )
    states, _ = loop.fit(training, training.init(), loop.Saving(folder), self._display)
    shutil.rmtree(folder)
    return states

  def errors(
    self,
    config: ml_collections.ConfigDict,
    program: cohort_program.Program,
    states,
    frozen,
    data: feed.Feed,
    runs: Sequence[tuple[int, float]],
    split: str,
  ) -> np.ndarray:
    """Mean squared errors [R, parts] of a whole split, in units of the source's variance.

    Targets are noisy on validation and free of noise on test.
    """
    split_arrays = [data.splits[seed][split] for seed in seeds_of(runs)]
    same = split == "test"  # every seed's test rows are the same
    wholes = [data.whole(seed, split) for seed in seeds_of(runs)][: 1 if same else None]
    batch = step_lib.stack(wholes)
    row = np.zeros(len(runs), np.int32) if same else seed_rows(runs)
    predictions = cohort_program.predict_all(program, states, frozen, batch, row)
    part_errors = []
    for prediction, place in zip(predictions, row, strict=True):
      arrays = split_arrays[place]
      error = np.square(prediction - (arrays.clean if same else arrays.targets))
      part_errors.append(by_part(error, parts(config.data.task, arrays), config.data.task))
    return np.stack(part_errors)

  def unadapted(self, config: ml_collections.ConfigDict) -> np.ndarray:
    """The frozen base's test error [parts]."""
    key = (config.data.to_json(), config.model.to_json())
    if key not in self._unadapted:
      self._unadapted[key] = self._of_base(config)
    return self._unadapted[key]

  def _of_base(self, config):
    none = mlp.MLP(mlp.MLPConfig(**config.model), adapter_config.AdapterConfig(family="none"))
    program = cohort_program.program(none, optimizer_lib.OptimizerConfig())
    runs = [(config.protocol.final_seeds[0], 0.0)]
    data = self.data(config, program, {runs[0][0]: None})
    states, frozen = program.init(self.base(config), *_axes(runs))
    return self.errors(config, program, states, frozen, data, runs, "test")[0]

  def init(self, config, program: cohort_program.Program, runs):
    """States [R] and frozen trees of fresh runs."""
    return program.init(self.base(config), *_axes(runs))

  def save(self, name: str, params: PyTree) -> None:
    """Saves trained weights [R, ..] under a name."""
    checkpoint.save(self.workdir / "params" / name, 0, jax.device_get(params))

  def load(self, name: str, like: PyTree) -> PyTree:
    """The weights saved under a name, shaped as `like`."""
    return checkpoint.restore(self.workdir / "params" / name, like, _silent)[1]


def search_and_final(
  config: ml_collections.ConfigDict,
  rates: Sequence[float],
  train: Callable[[Sequence[tuple[int, float]]], list[dict]],
) -> list[dict]:
  """Rows of a learning-rate search, and of fresh seeds at the rate with the least error.

  Args:
    train: (seed, learning rate) of the runs -> their rows, with `learning_rate` and
      `validation_mse`.
  """
  searched = train(study.search_trials(config, list(rates)))
  best = study.choose(searched)
  final = train(study.final_trials(config, best))
  return [
    {"stage": stage, **row}
    for stage, rows in (("search", searched), ("final", final))
    for row in rows
  ]


def seeds_of(runs: Sequence[tuple[int, float]]) -> tuple[int, ...]:
  """The distinct seeds, sorted: the order in which batches hold them."""
  return tuple(sorted({seed for seed, _ in runs}))


def seed_rows(runs: Sequence[tuple[int, float]]) -> np.ndarray:
  """int32 [R], each run's place in `seeds_of`."""
  seeds = seeds_of(runs)
  return np.array([seeds.index(seed) for seed, _ in runs], np.int32)


def rates_of(runs: Sequence[tuple[int, float]]) -> np.ndarray:
  """float [R]."""
  return np.array([rate for _, rate in runs])


def by_part(values: np.ndarray, part: np.ndarray, task: str) -> np.ndarray:
  """Means [parts] of values [n] over the examples of each part."""
  count = len(part_names(task))
  return np.bincount(part, values, count) / np.bincount(part, minlength=count)


def _axes(runs):
  return np.array([seed for seed, _ in runs]), rates_of(runs)


def _silent(text: str) -> None:
  del text


@functools.lru_cache(maxsize=64)
def _arrays(task, seed, data_dir, inputs, kind, level, rows) -> dict[str, pipeline.Arrays]:
  return pipeline.target_arrays(
    task,
    seed=seed,
    data_dir=data_dir,
    feature_dim=inputs,
    noise_kind=kind,
    noise_level=level,
    train_rows=rows,
  )
