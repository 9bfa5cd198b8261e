"""The loop: config -> data -> model -> step -> metrics -> rows, for a group of runs at a time.

A single run is a group of one. A group that was killed goes on from its last checkpoint and gives
the same numbers: data order is a function of (seed, step), and there is no other randomness.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import time

import jax
import ml_collections
import numpy as np

from qlora_jax.adapters import config as adapter_config
from qlora_jax.data import pipeline
from qlora_jax.evaluation import routing as routing_lib
from qlora_jax.instructions import cache, projection
from qlora_jax.models import mlp
from qlora_jax.parallel import processes
from qlora_jax.training import checkpoint, feed, metrics, optimizer, progress, settings, stop
from qlora_jax.training import group as group_lib
from qlora_jax.training import step as step_lib

ROUTING_ROWS = 1024  # test rows that routing statistics are taken over
_NONE = adapter_config.AdapterConfig(method="none")


@dataclasses.dataclass(frozen=True)
class GroupSpec:
  """Runs that train together: one config, several seeds and learning rates.

  Attributes:
    config: the resolved config of every run but for seed and learning rate.
    stage: 'search' or 'final'.
    runs: (seed, learning rate) of each run.
  """

  config: ml_collections.ConfigDict
  stage: str
  runs: tuple[tuple[int, float], ...]

  @property
  def label(self) -> str:
    return f"{data_name(self.config)}/{method_name(self.config)}/{self.stage}"

  @property
  def layout(self) -> tuple[tuple[int, ...], tuple[tuple[int, float], ...], np.ndarray]:
    """Data seeds, runs, and the place [runs] of each run's seed among the seeds, as they train.

    With fewer than `protocol.least_runs` runs the last one is repeated, and so is its seed, until
    both have that length; what copies give is dropped.
    """
    least, runs = self.config.protocol.least_runs, self.runs
    seeds = tuple(sorted({seed for seed, _ in runs}))
    runs += runs[-1:] * (least - len(runs))
    row = np.array([seeds.index(seed) for seed, _ in runs], np.int32)
    if least > 1:
      seeds += seeds[-1:] * (len(runs) - len(seeds))
    return seeds, runs, row

  @property
  def identity(self) -> str:
    """A hash of everything that decides the results."""
    config = self.config.to_dict()
    config.pop("seed", None), config["optimizer"].pop("learning_rate"), config.pop("mesh", None)
    config["data"].pop("data_dir"), config.pop("protocol"), config.pop("checkpoint")
    config["model"].pop("attention", None)
    text = json.dumps([config, self.stage, self.runs], sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def data_name(config: ml_collections.ConfigDict) -> str:
  """The regression task, or the text data set."""
  return config.data.task if "task" in config.data else config.data.name


def method_name(config: ml_collections.ConfigDict) -> str:
  """What tables call a setting's method: the config's label, or its adapter's name without one."""
  return config.label or config.adapter.name


class Loop:
  """Trains groups in one work directory; keeps what groups share in memory."""

  objective = "validation_mse"  # the column that a learning rate is chosen by

  def __init__(self, workdir: pathlib.Path, display: progress.Display):
    self.workdir = workdir
    self.display = display
    self._bases: dict[str, step_lib.PyTree] = {}
    self._arrays: dict[tuple, dict] = {}
    self._base_error: dict[str, float] = {}

  def finished(self, spec: GroupSpec) -> dict | None:
    """The result that an earlier process stored, or None."""
    path = self._directory(spec) / "result.json"
    return json.loads(path.read_text()) if path.exists() else None

  def summary(self, rows: list[dict]) -> str:
    """One line about the final runs of a setting."""
    column = "test_noisy_mse" if np.isnan(rows[0]["test_mse"]) else "test_mse"
    validation, error = (np.mean([row[name] for row in rows]) for name in (self.objective, column))
    return f"validation mse {validation:.4f}, test mse {error:.4f}"

  def train(self, spec: GroupSpec) -> dict:
    """Trains a group and stores its result.

    Returns:
      'rows', one a run; 'curves' and 'routing' as in the tables of the report.
    """
    stop.check()
    began = time.monotonic()
    resolved = settings.resolve(spec.config)
    directory = self._directory(spec)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", {**spec.config.to_dict(), "stage": spec.stage,
                                           "runs": spec.runs})  # fmt: skip
    data = self._feed(spec, resolved)
    base = self.base(spec.config)
    program = group_lib.program(resolved.network, resolved.optimizer, spec.config.mesh.runs)
    states, initial, frozen, curves = self._fit(spec, program, base, data, directory)
    result = self._evaluate(spec, resolved, program, states, initial, frozen, data)
    result["curves"] = curves
    for row in result["rows"]:
      row["seconds"] = (time.monotonic() - began) / len(spec.runs)
    write_json(directory / "result.json", result)
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    return result

  def base(self, config: ml_collections.ConfigDict):
    """The base network of a task and `pretrain.seed`, trained once a work directory."""
    task = pipeline.describe_task(config.data.task)
    # Trained in blocks of one layer, whatever the adapter's blocks are: they share one base.
    shape = config.model.to_dict() | {"layers_per_block": 1}
    model = mlp.MLPConfig(**shape)
    described = json.dumps([task.source_key, shape, config.pretrain.to_dict()], sort_keys=True)
    key = f"{task.source_key}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"
    if key not in self._bases:
      base = settings.random_base(model, config.pretrain.seed)
      directory = self.workdir / "bases" / key
      with checkpoint.lock(directory):  # of several workers one trains it, the others find it
        self._bases[key] = self._trained_base(config, task, model, base, directory)
    return mlp.in_blocks(self._bases[key], config.model.layers_per_block)

  def _trained_base(self, config, task, model, base, directory):
    restored = checkpoint.restore(directory, base, self.display.log)
    if restored is None:
      arrays = pipeline.source_arrays(
        task.name, data_dir=config.data.data_dir, feature_dim=model.inputs
      )
      settings_ = dict(config.pretrain)
      rate, seed = settings_.pop("learning_rate"), settings_.pop("seed")
      opt = optimizer.OptimizerConfig(**settings_)
      data = feed.Feed(
        {seed: arrays}, np.zeros((len(task.paraphrases), 1), np.float32), opt.batch_size, opt.steps
      )
      network = mlp.MLP(model, adapter_config.AdapterConfig(method="full"))
      program = group_lib.program(network, opt)
      states, frozen = program.init(base, np.array([0]), np.array([rate]))
      row = np.zeros(1, np.int32)
      for start in range(0, opt.steps, 100):
        batches = data.chunk((seed,), start, min(100, opt.steps - start))
        states, _ = program.train(states, frozen, batches, row)
      whole = step_lib.Batch(*(leaf[None] for leaf in data.whole(seed, "validation")))
      predictions = group_lib.predict_all(program, states, frozen, whole, row)
      error = float(np.mean(np.square(predictions[0] - arrays["validation"].targets)))
      self.display.log(f"base of {task.source_key}: source validation mse {error:.4f}")
      base = jax.tree.map(lambda leaf: leaf[0], states.params["base"])
      checkpoint.save(directory, opt.steps, base)
    else:
      base = restored[1]
    return jax.device_get(base)

  def _directory(self, spec: GroupSpec) -> pathlib.Path:
    return self.workdir / "groups" / spec.identity

  def _feed(self, spec: GroupSpec, resolved: settings.Settings) -> feed.Feed:
    cfg, splits = spec.config, {}
    for seed in sorted({seed for seed, _ in spec.runs}):
      shuffled = bool(cfg.instruction.shuffled)
      key = (json.dumps(cfg.data.to_dict(), sort_keys=True), resolved.model.inputs, seed, shuffled)
      if key not in self._arrays:
        self._arrays[key] = pipeline.target_arrays(
          cfg.data.task,
          seed=seed,
          data_dir=cfg.data.data_dir,
          feature_dim=resolved.model.inputs,
          noise_kind=cfg.data.noise_kind,
          noise_level=cfg.data.noise_level,
          train_rows=cfg.data.train_rows,
        )
        if shuffled:
          self._arrays[key] = pipeline.shuffled_wordings(self._arrays[key], seed)
      splits[seed] = self._arrays[key]
    table = self.instructions(cfg, resolved.adapter)
    return feed.Feed(splits, table, resolved.optimizer.batch_size, resolved.optimizer.steps)

  def instructions(
    self, config: ml_collections.ConfigDict, adapter: adapter_config.AdapterConfig
  ) -> np.ndarray:
    """The projected embedding [texts, E] of every paraphrase of a task; zeros for an adapter that
    reads none."""
    task = pipeline.describe_task(config.data.task)
    if not adapter.uses_instruction:
      return np.zeros((len(task.paraphrases), 1), np.float32)
    texts = cache.embed(task.paraphrases, config.instruction.encoder, self.workdir / "embeddings")
    seen = task.seen_paraphrases[: len(task.target_names)].ravel()
    return projection.apply(projection.fit(texts[seen], config.instruction.dim), texts)

  def _fit(self, spec, program, base, data, directory):
    seeds, runs, row = spec.layout
    drawn = (base, np.array([seed for seed, _ in runs]), np.array([rate for _, rate in runs]))
    states, frozen = program.init(*drawn)
    # Training gives up its state's memory: the start, which routing is compared with, is a copy.
    initial = program.init(*drawn)[0].params if program.model.adapter.has_router else None
    every = spec.config.eval.routing_every if initial is not None and spec.stage == "final" else 0
    steps = program.optimizer.steps if jax.tree.leaves(states.params) else 0
    validation = step_lib.Batch(
      *(np.stack(leaves) for leaves in zip(*(data.whole(s, "validation") for s in seeds),
                                           strict=True))
    )  # fmt: skip
    with contextlib.ExitStack() as open_:
      writer = open_.enter_context(metrics.MetricWriter(directory))
      saver = open_.enter_context(checkpoint.Checkpointer(
        directory / "checkpoints", keep=spec.config.checkpoint.keep, log=self.display.log
      ))  # fmt: skip
      saved = saver.restore(states)
      done, states = (saved.step, saved.tree) if saved else (0, states)
      shown = open_.enter_context(
        self.display.group(spec.label, len(spec.runs), max(steps, 1), start_step=done)
      )
      writer.truncate(done)
      saved_at = time.monotonic()
      while done < steps:
        count = min(spec.config.eval.every, steps - done)
        began = time.monotonic()
        states, values = program.train(states, frozen, data.chunk(seeds, done, count), row)
        predictions = group_lib.predict_all(program, states, frozen, validation, row)
        error = np.mean(np.square(predictions - validation.targets[row]), axis=1)
        done += count
        losses = np.asarray(values["train/loss"])
        routing = [{}] * len(runs)
        if every and (done // every > (done - count) // every or done == steps):
          some = step_lib.Batch(*(leaf[:, :ROUTING_ROWS] for leaf in validation))
          routing = program.routing_gain(states.params, initial, frozen, some, row)
        for index, (seed, rate) in enumerate(spec.runs):
          writer.write(
            done,
            {"train/loss": losses[index], "validation/mse": error[index], **routing[index]},
            f"seed={seed},lr={rate:g}",
          )
        elapsed = time.monotonic() - began
        examples = count * data.batch_size * len(spec.runs) / elapsed
        shown.update(done, loss=float(np.nanmedian(losses)), rate=examples)
        due = time.monotonic() - saved_at > spec.config.checkpoint.seconds
        if (due or stop.requested()) and done < steps:
          writer.flush()
          saver.save(done, states)
          saved_at = time.monotonic()
          if stop.requested():
            saver.wait()
            stop.check()
      writer.flush()
      shown.update(max(steps, 1))
    names = {f"seed={s},lr={r:g}": self._run_id(spec, s, r) for s, r in spec.runs}
    curves = [
      {
        "run_id": names[line["run"]],
        "step": line["step"],
        "train_loss": line["train/loss"],
        "validation_mse": line["validation/mse"],
        **{name: line[name] for name in routing_lib.COLUMNS if name in line},
      }
      for line in metrics.read_metrics(directory / metrics.FILE_NAME)
    ]
    return states, initial, frozen, curves

  def _run_id(self, spec, seed, rate) -> str:
    return f"{spec.identity}-{seed}-{rate:g}"

  def _evaluate(self, spec, resolved, program, states, initial, frozen, data) -> dict:
    cfg, task = spec.config, pipeline.describe_task(spec.config.data.task)
    seeds, runs, row = spec.layout
    validation = np.stack([data.splits[s]["validation"].targets for s in seeds])[row]
    whole = step_lib.Batch(
      *(np.stack(leaves) for leaves in zip(*(data.whole(s, "validation") for s in seeds),
                                           strict=True))
    )  # fmt: skip
    on_validation = group_lib.predict_all(program, states, frozen, whole, row)
    test, test_batch = data.splits[seeds[0]]["test"], data.whole(seeds[0], "test")
    zero = np.zeros(len(runs), np.int32)
    on_test = group_lib.predict_all(
      program, states, frozen, step_lib.Batch(*(leaf[None] for leaf in test_batch)), zero
    )
    on_known = on_test
    if resolved.adapter.uses_instruction and not cfg.instruction.shuffled:
      known = data.rows(pipeline.known_wordings(task, test))
      on_known = group_lib.predict_all(
        program, states, frozen, step_lib.Batch(*(leaf[None] for leaf in known)), zero
      )
    base_error = self._unadapted_error(resolved, spec, test, test_batch, frozen)
    rows = []
    for index, (seed, rate) in enumerate(spec.runs):
      validation_mse = float(np.mean(np.square(on_validation[index] - validation[index])))
      noisy = float(np.mean(np.square(on_test[index] - test.targets)))
      clean = float(np.mean(np.square(on_test[index] - test.clean)))
      rows.append({
        "run_id": self._run_id(spec, seed, rate), "stage": spec.stage, "task": task.name,
        "noise_kind": (cfg.data.noise_kind or task.default_noise) if task.has_clean else "own",
        "noise_level": cfg.data.noise_level, "method": method_name(cfg),
        "adapter": resolved.adapter.method, "seed": seed, "learning_rate": rate,
        "rank": resolved.adapter.rank, "atoms": resolved.adapter.atoms,
        "top_k": resolved.adapter.top_k, "trainable_params": resolved.trainable_params,
        "steps": resolved.optimizer.steps, "validation_mse": validation_mse,
        "test_mse": clean if task.has_clean else float("nan"), "test_noisy_mse": noisy,
        # The same inputs, with wordings of their instruction that training has seen.
        "test_known_mse": float(np.mean(np.square(on_known[index] - test.clean))),
        "base_mse": base_error,
        "diverged": not np.isfinite(validation_mse)
        or (clean if task.has_clean else noisy) > base_error,
      })  # fmt: skip
      if resolved.adapter.method == "none":
        rows[-1]["diverged"] = False
    routing = self._routing(spec, task, program, states, frozen, test, test_batch, rows)
    if initial is not None:
      targets = test.clean if task.has_clean else test.targets
      some = test_batch._replace(targets=targets)
      some = step_lib.Batch(*(leaf[None, :ROUTING_ROWS] for leaf in some))
      gained = program.routing_gain(states.params, initial, frozen, some, zero)
      for row, columns in zip(rows, gained[: len(rows)], strict=True):  # the rest are copies
        row |= columns
    return {"rows": rows, "routing": routing}

  def _unadapted_error(self, resolved, spec, test, test_batch, frozen) -> float:
    key = json.dumps(
      [spec.config.data.to_dict(), spec.config.model.to_dict(), spec.config.pretrain.to_dict()]
    )
    if key not in self._base_error:
      program = group_lib.program(mlp.MLP(resolved.model, _NONE), resolved.optimizer)
      states, frozen = program.init(frozen.base, np.array([0]), np.array([0.0]))
      batch = step_lib.Batch(*(leaf[None] for leaf in test_batch))
      values = group_lib.predict_all(program, states, frozen, batch, np.zeros(1, np.int32))
      self._base_error[key] = float(np.mean(np.square(values[0] - test.clean)))
    return self._base_error[key]

  def _routing(self, spec, task, program, states, frozen, test, batch, rows) -> list[dict]:
    """Adds routing statistics to the rows; returns the routing maps of final runs."""
    some = step_lib.Batch(*(leaf[:ROUTING_ROWS] for leaf in batch))
    groups = test.target_id[:ROUTING_ROWS]
    maps = []
    for given in (True, False):
      seen = some if given else some._replace(instruction=np.zeros_like(some.instruction))
      out = jax.device_get(
        program.route(states, frozen, seen, groups, num_groups=len(task.target_names))
      )
      norms = program.update_norms(states, out.get("weights")) if given else [None] * len(rows)
      for index, row in enumerate(rows):
        if norms[index] is not None:
          row["bound/certified"] = norms[index]["certified"]
          row["bound/measured"] = norms[index]["measured"]
        if "routing" not in out:
          continue
        if given:
          for name in ("effective_support", "entropy", "max_share"):
            row[f"router/{name}"] = float(out["routing"][name][index])
        if spec.stage != "final" or index or not program.model.adapter.routed:
          continue  # one run's map is shown: atoms have no order across seeds
        for target, block, atom in np.ndindex(out["shares"][index].shape):
          maps.append({
            "run_id": row["run_id"], "task": task.name, "method": row["method"],
            "target": task.target_names[target], "with_instruction": given, "block": block,
            "atom": atom, "weight": float(out["shares"][index][target, block, atom]),
          })  # fmt: skip
    return maps


def write_json(path: pathlib.Path, value) -> None:
  """Writes JSON whole or not at all; of several processes the first one does."""
  if not processes.is_first():
    return
  temporary = path.with_suffix(f".tmp{os.getpid()}")
  temporary.write_text(json.dumps(value, default=list, indent=1))
  temporary.replace(path)
