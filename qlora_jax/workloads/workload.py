"""The workload protocol: what differs between trainings; `training/loop.py` trains any of them.

As in MLCommons' algorithmic-efficiency benchmark, a workload brings its data, model and loss, and
the loop knows nothing of them. Regression trains a cohort of trials as one vmapped program, many
steps per call; language trains one trial, step by step, on a mesh.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import ml_collections

from qlora_jax.adapters import config as adapter_config
from qlora_jax.training import optimizer as optimizer_lib
from qlora_jax.typing import Array, PyTree

State = PyTree


class Trial(NamedTuple):
  """One training of an arm."""

  seed: int
  learning_rate: float


@dataclasses.dataclass(frozen=True)
class Cohort:
  """Trials of one arm that train as one program.

  Attributes:
    config: the arm's resolved config; seed and learning rate are the trials'.
    stage: 'search' or 'final'.
    trials: (seed, learning rate) of each.
  """

  config: ml_collections.ConfigDict
  stage: str
  trials: tuple[Trial, ...]

  @property
  def label(self) -> str:
    return f"{task_name(self.config)}/{arm_name(self.config)}/{self.stage}"

  @property
  def identity(self) -> str:
    """A hash of everything that decides the results."""
    config = self.config.to_dict()
    config.pop("seed", None), config["optimizer"].pop("learning_rate"), config.pop("mesh", None)
    config["data"].pop("data_dir"), config.pop("protocol"), config.pop("checkpoint")
    config["model"].pop("attention", None)
    text = json.dumps([config, self.stage, self.trials], sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def trial_id(self, trial: Trial) -> str:
    """Names one trial's rows in every table of a study."""
    return f"{self.identity}-{trial.seed}-{trial.learning_rate:g}"


def task_name(config: ml_collections.ConfigDict) -> str:
  """The regression task, or the text data set."""
  return config.data.task if "task" in config.data else config.data.name


def arm_name(config: ml_collections.ConfigDict) -> str:
  """What tables call an arm: the config's label, or its adapter preset without one."""
  return config.label or config.adapter.name


class Settings(Protocol):
  """A config after its checks.

  Attributes:
    adapter: sized; optimizer: of a trial.
    trainable_params: count of the trained tree.
  """

  adapter: adapter_config.AdapterConfig
  optimizer: optimizer_lib.OptimizerConfig
  trainable_params: int


def result_row(cohort: Cohort, trial: Trial, settings: Settings) -> dict[str, Any]:
  """The columns that the result of a trial has in every workload."""
  adapter = settings.adapter
  return {
    "trial_id": cohort.trial_id(trial),
    "stage": cohort.stage,
    "task": task_name(cohort.config),
    "arm": arm_name(cohort.config),
    "family": adapter.family,
    "seed": trial.seed,
    "learning_rate": trial.learning_rate,
    "rank": adapter.rank,
    "atoms": adapter.atoms,
    "top_k": adapter.top_k,
    "trainable_params": settings.trainable_params,
    "steps": settings.optimizer.steps,
  }


class Batches(NamedTuple):
  """Input of consecutive steps.

  Attributes:
    arrays: what `Workload.update` reads.
    amount: examples or tokens in them, over all trials and processes.
  """

  arrays: Any
  amount: int


class Best(NamedTuple):
  """The state after the step with the least objective."""

  step: int
  state: State
  objective: float


class Workload(Protocol):
  """Trials that train together: their data, model, loss and scores.

  Attributes:
    name: shown with the progress.
    unit: what `Batches.amount` counts: 'examples' or 'tokens'.
    trial_labels: names each trial's lines in the metrics; (None,) for one trial alone.
    steps: optimizer steps of a trial; 0 where nothing is trained.
    chunk: steps per call of `update`.
    log_every: steps between two lines of metrics, a multiple of `chunk`.
    curve_columns: names in the metrics that the table of curves has, and its column of each.
  """

  name: str
  unit: str
  trial_labels: Sequence[str | None]
  steps: int
  chunk: int
  log_every: int
  curve_columns: Mapping[str, str]

  def init(self) -> State:
    """The state before the first step."""
    ...

  def batches(self, start: int, count: int) -> Batches:
    """The input of the steps `start` to `start + count`, asked for in order."""
    ...

  def position(self) -> dict[str, Any]:
    """JSON from which `seek` finds the input again; {} where the step says it all."""
    ...

  def seek(self, position: dict[str, Any]) -> None:
    """Makes `batches` go on where `position` was asked for."""
    ...

  def update(self, state: State, arrays: Any) -> tuple[State, Mapping[str, Array]]:
    """Takes the steps of `Batches.arrays`; gives up the memory of `state`.

    Returns:
      The state, and means over the steps, [trials] or a scalar: 'train/loss', 'train/grad_norm'.
    """
    ...

  def validate(self, state: State, step: int) -> list[dict[str, float]]:
    """Scores of each trial after `step` steps; empty where none are due."""
    ...

  def evaluate(self, state: State, best: Best | None) -> dict[str, Any]:
    """The result: 'rows', one per trial with its 'trial_id', and other tables by name.

    'last', where it is there, has for each trial the columns that its last point of the curves
    gets besides: what is measured once, at the end.

    Args:
      state: after the last step; best: of the best step, where it was looked for.
    """
    ...


class Resources(Protocol):
  """What the cohorts of one work directory share: bases, data, embeddings, scores of the base.

  Attributes:
    workdir: of the study.
    objective: the column of a result's rows that a learning rate is chosen by, the less the
      better; `validate` names it, too, where the best step is kept.
    unit: as in `Workload`.
  """

  workdir: pathlib.Path
  objective: str
  unit: str

  def cohorts(
    self, config: ml_collections.ConfigDict, stage: str, trials: Sequence[Trial]
  ) -> list[Cohort]:
    """The cohorts that train these trials."""
    ...

  def open(self, cohort: Cohort, directory: pathlib.Path) -> Workload:
    """The workload of a cohort; its own files go to `directory`."""
    ...

  def summary(self, rows: list[dict]) -> str:
    """One line about the final trials of an arm."""
    ...
