"""Noisy regression: a cohort of trials, seeds x learning rates, trained as one compiled program.

A single trial is a cohort of one. The frozen base of a task is trained once per work directory, by
the same loop.
"""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import ml_collections
import numpy as np

from qlora_jax import files
from qlora_jax.adapters import config as adapter_config
from qlora_jax.data import pipeline
from qlora_jax.instructions import table
from qlora_jax.models import mlp
from qlora_jax.training import checkpoint, loop, optimizer, progress, stop
from qlora_jax.training import step as step_lib
from qlora_jax.workloads import cohort_program, feed, regression_config, routing_gain
from qlora_jax.workloads import workload as workload_lib

ROUTING_ROWS = 1024  # rows that routing statistics are taken over
PIECE = 100  # steps per call where nothing is evaluated between
_NONE = adapter_config.AdapterConfig(family="none")


def layout(
  cohort: workload_lib.Cohort,
) -> tuple[tuple[int, ...], tuple[workload_lib.Trial, ...], np.ndarray]:
  """Data seeds, trials, and the place [trials] of each trial's seed among the seeds, as they train.

  With fewer than `protocol.least_runs` trials the last one is repeated, and so is its seed, until
  both have that length; the results of copies are dropped.
  """
  least, trials = cohort.config.protocol.least_runs, cohort.trials
  seeds = tuple(sorted({seed for seed, _ in trials}))
  trials += trials[-1:] * (least - len(trials))
  seed_row = np.array([seeds.index(seed) for seed, _ in trials], np.int32)
  if least > 1:
    seeds += seeds[-1:] * (len(trials) - len(seeds))
  return seeds, trials, seed_row


class Training:
  """A workload that trains given states on a feed and scores nothing.

  Attributes:
    program: the compiled functions; feed: the data.
    seeds: of the data, in the order that `seed_row` [R] counts them.
    frozen: trees that no gradient reaches.
  """

  unit = "examples"
  trial_labels: Sequence[str | None] = ()
  curve_columns: ClassVar[dict[str, str]] = {}

  def __init__(
    self,
    name: str,
    program: cohort_program.Program,
    data: feed.Feed,
    seeds: tuple[int, ...],
    seed_row: np.ndarray,
    states: step_lib.TrainState,
    frozen: step_lib.Frozen,
    chunk: int = PIECE,
  ):
    self.name, self.program, self.feed = name, program, data
    self.seeds, self.seed_row, self.frozen = seeds, seed_row, frozen
    self.chunk = self.log_every = chunk
    self.steps = program.optimizer.steps if jax.tree.leaves(states.params) else 0
    self._states = states

  def init(self) -> step_lib.TrainState:
    """The given states; `update` takes over their memory."""
    return self._states

  def batches(self, start: int, count: int) -> workload_lib.Batches:
    amount = count * self.feed.batch_size * max(len(self.trial_labels), 1)
    return workload_lib.Batches(self.feed.chunk(self.seeds, start, count), amount)

  def position(self) -> dict[str, Any]:
    return {}

  def seek(self, position: dict[str, Any]) -> None:
    del position

  def update(self, state, arrays):
    return self.program.train(state, self.frozen, arrays, self.seed_row)

  def validate(self, state, step: int) -> list[dict[str, float]]:
    del state, step
    return []

  def evaluate(self, state, best) -> dict[str, Any]:
    del state, best
    return {"rows": []}


class Resources:
  """What the cohorts of one work directory share in memory: bases, data, errors of the base."""

  objective = "validation_mse"
  unit = "examples"

  def __init__(self, workdir: pathlib.Path, display: progress.Display):
    self.workdir, self.display = workdir, display
    self._bases: dict[str, step_lib.PyTree] = {}
    self._splits: dict[tuple, dict] = {}
    self._base_errors: dict[str, float] = {}

  def cohorts(self, config, stage, trials) -> list[workload_lib.Cohort]:
    """All trials train as one program."""
    return [workload_lib.Cohort(config, stage, tuple(trials))]

  def open(self, cohort: workload_lib.Cohort, directory: pathlib.Path) -> "Regression":
    del directory
    return Regression(self, cohort)

  def saving(self, cohort: workload_lib.Cohort, directory: pathlib.Path) -> loop.Saving:
    fields = cohort.config.checkpoint
    return loop.Saving(
      directory,
      seconds=fields.seconds,
      keep=fields.keep,
      on_nonfinite=fields.get("on_nonfinite", "end"),
    )

  def summary(self, rows: list[dict]) -> str:
    """One line about the final trials of an arm."""
    column = "test_noisy_mse" if np.isnan(rows[0]["test_mse"]) else "test_mse"
    validation, error = (np.mean([row[name] for row in rows]) for name in (self.objective, column))
    return f"validation mse {validation:.4f}, test mse {error:.4f}"

  def base(self, config: ml_collections.ConfigDict):
    """The base network of a task and `pretrain.seed`, trained once per work directory."""
    task = pipeline.describe_task(config.data.task)
    # Trained in blocks of one layer, whatever the adapter's blocks are: they share one base.
    shape = config.model.to_dict() | {"layers_per_block": 1}
    model = mlp.MLPConfig(**shape)
    described = json.dumps([task.source_key, shape, config.pretrain.to_dict()], sort_keys=True)
    key = f"{task.source_key}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"
    if key not in self._bases:
      directory = self.workdir / "bases" / key
      with files.lock(directory):  # one of several workers trains it, the others find it
        self._bases[key] = self._trained_base(config, task, model, directory)
    return mlp.in_blocks(self._bases[key], config.model.layers_per_block)

  def _trained_base(self, config, task, model, directory):
    base = regression_config.random_base(model, config.pretrain.seed)
    restored = checkpoint.restore(directory, base, self.display.log)
    if restored is not None:
      return jax.device_get(restored[1])
    arrays = pipeline.source_arrays(
      task.name, data_dir=config.data.data_dir, feature_dim=model.inputs
    )
    fields = dict(config.pretrain)
    rate, seed = fields.pop("learning_rate"), fields.pop("seed")
    opt = optimizer.OptimizerConfig(**fields)
    instructions = np.zeros((len(task.paraphrases), 1), np.float32)
    data = feed.Feed({seed: arrays}, instructions, opt.batch_size, opt.steps)
    network = mlp.MLP(model, adapter_config.AdapterConfig(family="full"))
    program = cohort_program.program(network, opt)
    states, frozen = program.init(base, np.array([0]), np.array([rate]))
    training = Training(
      f"base of {task.source_key}", program, data, (seed,), np.zeros(1, np.int32), states, frozen
    )
    saving = loop.Saving(directory.with_name(f"{directory.name}-training"))
    states, _ = loop.fit(training, training.init(), saving, self.display)
    whole = data.whole(seed, "validation")
    predictions = cohort_program.predict_all(
      program, states, frozen, step_lib.stack([whole]), training.seed_row
    )
    error = float(np.mean(np.square(predictions[0] - arrays["validation"].targets)))
    self.display.log(f"base of {task.source_key}: source validation mse {error:.4f}")
    base = jax.tree.map(lambda leaf: leaf[0], states.params["base"])
    checkpoint.save(directory, opt.steps, base)
    shutil.rmtree(saving.directory)
    return jax.device_get(base)

  def splits(
    self, config: ml_collections.ConfigDict, feature_dim: int, seed: int
  ) -> dict[str, pipeline.Arrays]:
    """A seed's splits; with `instruction.shuffled` the wordings of all targets change places."""
    shuffled = bool(config.instruction.shuffled)
    key = (json.dumps(config.data.to_dict(), sort_keys=True), feature_dim, seed, shuffled)
    if key not in self._splits:
      splits = pipeline.target_arrays(
        config.data.task,
        seed=seed,
        data_dir=config.data.data_dir,
        feature_dim=feature_dim,
        noise_kind=config.data.noise_kind,
        noise_level=config.data.noise_level,
        train_rows=config.data.train_rows,
      )
      self._splits[key] = pipeline.shuffled_wordings(splits, seed) if shuffled else splits
    return self._splits[key]

  def instructions(
    self, config: ml_collections.ConfigDict, adapter: adapter_config.AdapterConfig
  ) -> np.ndarray:
    """The projected embedding [texts, E] of every paraphrase of a task; zeros for an adapter that
    reads none."""
    task = pipeline.describe_task(config.data.task)
    if not adapter.uses_instruction:
      return np.zeros((len(task.paraphrases), 1), np.float32)
    seen = task.seen_paraphrases[: len(task.target_names)].ravel()
    fields = config.instruction
    vectors, _ = table.embedded(
      task.paraphrases, seen, fields.encoder, fields.dim, self.workdir / "embeddings"
    )
    return vectors

  def base_error(self, cohort, settings, base, test, test_batch) -> float:
    """The frozen base's mean squared error on the test rows."""
    config = cohort.config
    key = json.dumps([config.data.to_dict(), config.model.to_dict(), config.pretrain.to_dict()])
    if key not in self._base_errors:
      program = cohort_program.program(mlp.MLP(settings.model, _NONE), settings.optimizer)
      states, frozen = program.init(base, np.array([0]), np.array([0.0]))
      values = cohort_program.predict_all(
        program, states, frozen, step_lib.stack([test_batch]), np.zeros(1, np.int32)
      )
      self._base_errors[key] = float(np.mean(np.square(values[0] - test.clean)))
    return self._base_errors[key]


class Regression(Training):
  """The trials of one cohort."""

  curve_columns: ClassVar[dict[str, str]] = {
    "train/loss": "train_loss",
    "validation/mse": "validation_mse",
    **{name: name for name in routing_gain.COLUMNS},
  }

  def __init__(self, resources: Resources, cohort: workload_lib.Cohort):
    stop.check()
    config = cohort.config
    self.resources, self.cohort = resources, cohort
    self.settings = regression_config.resolve(config)
    self.task = pipeline.describe_task(config.data.task)
    seeds, trials, seed_row = layout(cohort)
    splits = {
      seed: resources.splits(config, self.settings.model.inputs, seed) for seed in set(seeds)
    }
    instructions = resources.instructions(config, self.settings.adapter)
    opt = self.settings.optimizer
    data = feed.Feed(splits, instructions, opt.batch_size, opt.steps)
    program = cohort_program.program(self.settings.network, opt, config.mesh.runs)
    drawn = (
      resources.base(config),
      np.array([seed for seed, _ in trials]),
      np.array([rate for _, rate in trials]),
    )
    states, frozen = program.init(*drawn)
    # Training gives up its state's memory: the start, which routing is compared with, is a copy.
    self.initial = program.init(*drawn)[0].params if program.model.adapter.has_router else None
    super().__init__(
      cohort.label, program, data, seeds, seed_row, states, frozen, config.eval.every
    )
    self.trial_labels = [f"seed={seed},lr={rate:g}" for seed, rate in cohort.trials]
    self._validation = step_lib.stack([data.whole(seed, "validation") for seed in seeds])
    measured = self.initial is not None and cohort.stage == "final"
    self._routing_every = config.eval.routing_every if measured else 0

  def validate(self, state, step: int) -> list[dict[str, float]]:
    targets = self._validation.targets[self.seed_row]
    errors = np.mean(np.square(self._predictions(state, self._validation) - targets), axis=1)
    routing = [{}] * len(errors)
    every, before = self._routing_every, (step - 1) // self.chunk * self.chunk
    if every and (step // every > before // every or step == self.steps):
      some = step_lib.Batch(*(leaf[:, :ROUTING_ROWS] for leaf in self._validation))
      routing = self.program.routing_gain(
        state.params, self.initial, self.frozen, some, self.seed_row
      )
    return [
      {"validation/mse": error, **columns} for error, columns in zip(errors, routing, strict=True)
    ]

  def evaluate(self, state, best) -> dict[str, Any]:
    del best
    config, task, adapter = self.cohort.config, self.task, self.settings.adapter
    targets = self._validation.targets[self.seed_row]
    on_validation = self._predictions(state, self._validation)
    test = self.feed.splits[self.seeds[0]]["test"]
    test_batch = self.feed.whole(self.seeds[0], "test")
    on_test = self._predictions(state, step_lib.stack([test_batch]), same=True)
    on_known = on_test
    if adapter.uses_instruction and not config.instruction.shuffled:
      known = self.feed.rows(pipeline.known_wordings(task, test))
      on_known = self._predictions(state, step_lib.stack([known]), same=True)
    base_error = self.resources.base_error(
      self.cohort, self.settings, self.frozen.base, test, test_batch
    )
    rows = []
    for index, trial in enumerate(self.cohort.trials):
      validation_mse = float(np.mean(np.square(on_validation[index] - targets[index])))
      noisy = float(np.mean(np.square(on_test[index] - test.targets)))
      clean = float(np.mean(np.square(on_test[index] - test.clean)))
      judged = clean if task.has_clean else noisy
      rows.append(
        {
          **workload_lib.result_row(self.cohort, trial, self.settings),
          "noise_kind": (config.data.noise_kind or task.default_noise) if task.has_clean else "own",
          "noise_level": config.data.noise_level,
          "validation_mse": validation_mse,
          "test_mse": clean if task.has_clean else float("nan"),
          "test_noisy_mse": noisy,
          # The same inputs, with wordings of their instruction that training has seen.
          "test_known_mse": float(np.mean(np.square(on_known[index] - test.clean))),
          "base_mse": base_error,
          "diverged": adapter.family != "none"
          and (not np.isfinite(validation_mse) or judged > base_error),
        }
      )
    routing = self._add_routing(rows, state, test, test_batch)
    return {"rows": rows, "routing": routing}

  def _predictions(self, state, batch: step_lib.Batch, same: bool = False) -> np.ndarray:
    """Predictions [R, n]; `same` rows for every trial, or those of its seed."""
    row = np.zeros_like(self.seed_row) if same else self.seed_row
    return cohort_program.predict_all(self.program, state, self.frozen, batch, row)

  def _add_routing(self, rows, state, test, batch) -> list[dict]:
    """Adds routing statistics to the rows; returns the routing maps of final trials."""
    some = step_lib.Batch(*(leaf[:ROUTING_ROWS] for leaf in batch))
    target_ids, maps = test.target_id[:ROUTING_ROWS], []
    for with_instruction in (True, False):
      seen = some
      if not with_instruction:
        seen = some._replace(instruction=np.zeros_like(some.instruction))
      out = jax.device_get(
        self.program.route(
          state, self.frozen, seen, target_ids, num_groups=len(self.task.target_names)
        )
      )
      norms = [None] * len(rows)
      if with_instruction:
        norms = self.program.update_norms(state, out.get("weights"))
      for index, row in enumerate(rows):
        if norms[index] is not None:
          row["bound/certified"] = norms[index]["certified"]
          row["bound/measured"] = norms[index]["measured"]
        if "routing" not in out:
          continue
        if with_instruction:
          for name in ("effective_support", "entropy", "max_share"):
            row[f"router/{name}"] = float(out["routing"][name][index])
        if self.cohort.stage != "final" or index or not self.settings.adapter.routed:
          continue  # one trial's map is shown: atoms have no order across seeds
        for target, block, atom in np.ndindex(out["shares"][index].shape):
          maps.append(
            {
              "trial_id": row["trial_id"],
              "task": self.task.name,
              "arm": row["arm"],
              "target": self.task.target_names[target],
              "with_instruction": with_instruction,
              "block": block,
              "atom": atom,
              "weight": float(out["shares"][index][target, block, atom]),
            }
          )
    if self.initial is not None:
      targets = test.clean if self.task.has_clean else test.targets
      clean = some._replace(targets=targets[:ROUTING_ROWS])
      gained = self.program.routing_gain(
        state.params,
        self.initial,
        self.frozen,
        step_lib.stack([clean]),
        np.zeros_like(self.seed_row),
      )
      for row, columns in zip(rows, gained[: len(rows)], strict=True):  # the rest are copies
        row |= columns
    return maps
