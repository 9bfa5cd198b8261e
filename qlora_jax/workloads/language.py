"""Fine-tuning a language model: one trial, step by step, on a mesh of devices.

The loss is taken over answer tokens. A search trial is judged by the likelihood of validation
answers; a final one also generates, before and after, and both leave an adapter's folder.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
from typing import Any, ClassVar

import jax
import ml_collections
import numpy as np
from flax import serialization
from jax import numpy as jnp

from qlora_jax import files
from qlora_jax.adapters import config as adapter_config
from qlora_jax.data.text import pipeline, records
from qlora_jax.instructions import table
from qlora_jax.models import decoder, fast_attention
from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.parallel import processes, sharding
from qlora_jax.training import loop, progress, resume
from qlora_jax.training import step as step_lib
from qlora_jax.weights import adapter_file, hf_layout
from qlora_jax.workloads import (
  language_config,
  language_evaluation,
  language_shards,
  routing_gain,
)
from qlora_jax.workloads import workload as workload_lib

ADAPTER = "adapter"  # folder of the result in a run's directory
BEST = "adapter_best"  # the step with the best validation likelihood, where it was measured
_NO_ADAPTER = adapter_config.AdapterConfig(family="none")


@functools.lru_cache(maxsize=1)  # the trials of a study share one base
def _base(weights: str, shape: decoder.DecoderConfig, shards: language_shards.Shards):
  from qlora_jax.weights import sources

  placed = shards.variables(decoder.Decoder(shape, _NO_ADAPTER))["base"]
  return hf_layout.load_base(sources.open_source(weights), shape, placed)


class Resources:
  """What the trials of one work directory share: embeddings and the scores of the base."""

  objective = "validation_nats"
  unit = "tokens"

  def __init__(self, workdir: pathlib.Path, display: progress.Display):
    self.workdir, self.display = workdir, display

  def cohorts(self, config, stage, trials) -> list[workload_lib.Cohort]:
    """One per trial: each fills the devices."""
    return [workload_lib.Cohort(config, stage, (trial,)) for trial in trials]

  def open(self, cohort: workload_lib.Cohort, directory: pathlib.Path) -> "Language":
    return Language(self, cohort, directory)

  def saving(self, cohort: workload_lib.Cohort, directory: pathlib.Path) -> loop.Saving:
    config = _of_trial(cohort)
    fields = config.checkpoint
    return loop.Saving(
      directory,
      seconds=fields.seconds,
      keep=fields.keep,
      keep_best=fields.keep_best,
      objective="validation/nats",
      config=resume.plain(config),
      at_end=True,
      on_nonfinite=fields.get("on_nonfinite", "end"),
    )

  def summary(self, rows: list[dict]) -> str:
    """One line about the final trials of an arm."""
    nats = sum(row["validation_nats"] for row in rows) / len(rows)
    if "test_accuracy" not in rows[0]:
      return f"validation {nats:.3f} nats"
    before = rows[0]["base_test_accuracy"]
    after = sum(row["test_accuracy"] for row in rows) / len(rows)
    return f"validation {nats:.3f} nats, exact match {100 * before:.1f} % -> {100 * after:.1f} %"


def _of_trial(cohort: workload_lib.Cohort) -> ml_collections.ConfigDict:
  """The config with the seed and learning rate of a cohort's only trial."""
  config = cohort.config.copy_and_resolve_references()
  config.unlock()
  ((config.seed, config.optimizer.learning_rate),) = cohort.trials
  return config


class Language:
  """The only trial of a cohort.

  Args:
    resources: what the trials of a work directory share.
    cohort: of kind `language`, with one trial.
    directory: the trial's adapter goes there.
  """

  unit = "tokens"
  trial_labels = (None,)
  chunk = 1
  curve_columns: ClassVar[dict[str, str]] = {
    "train/loss": "train_loss",
    **{name: name for name in routing_gain.COLUMNS},
  }

  def __init__(self, resources: Resources, cohort: workload_lib.Cohort, directory: pathlib.Path):
    self.resources, self.cohort, self.directory = resources, cohort, directory
    self.display, self.shared = resources.display, resources.workdir
    self.config = config = _of_trial(cohort)
    self.settings = language_config.resolve(config)
    self.model, self.steps = self.settings.model, self.settings.optimizer.steps
    self.name = f"{cohort.label}/seed{config.seed}-lr{config.optimizer.learning_rate:g}"
    self.log_every = config.eval.every
    fast_attention.check(self.model.config.attention, jax.default_backend())
    layout = mesh_lib.from_config(config.mesh)
    self.shards = language_shards.Shards(mesh_lib.make(layout), layout.rules)
    mesh_lib.check_batch(self.shards.mesh, config.optimizer.batch_size, self.settings.micro_batches)
    self.tokenizer = self.settings.source.tokenizer()
    self.tokenizer.check_vocab(self.model.config.vocabulary)
    data = config.data
    with processes.in_turn():  # prepared data and embeddings are kept in files
      self.data = pipeline.load(
        data.name,
        seed=config.seed,
        data_dir=data.data_dir,
        manual_folder=data.manual_folder,
        tasks=data.tasks,
        train_rows=data.train_rows,
      )
      if config.instruction.get("exchanged"):
        self.data = records.exchanged(self.data, seed=config.seed)
      self.table, self.projection = self._instructions()
    self.evaluation = language_evaluation.Evaluation(
      config, self.tokenizer, self.data, self.table, self.shards, self.display
    )
    self.base = _base(config.model.weights, self.model.config, self.shards)

  @property
  def generates(self) -> bool:
    """Whether answers are generated before and after; likelihoods are taken always."""
    return self.cohort.stage == "final"

  def _instructions(self) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Embeddings [instructions, E] and the projection that made them, or None and {}."""
    if not self.model.adapter.uses_instruction:
      return None, {}
    texts = [text or " " for text in self.data.instruction_texts]
    seen = sorted({index for ids in self.data.seen_ids.values() for index in ids})
    fields = self.config.instruction
    vectors, fitted = table.embedded(
      texts, seen, fields.encoder, fields.dim, self.shared / "embeddings"
    )
    if fields.shuffled:  # the control: wordings of all tasks change places
      vectors = vectors[np.random.default_rng(self.config.seed).permutation(len(vectors))]
    return vectors, {name: np.asarray(value) for name, value in fitted._asdict().items()}

  def init(self) -> step_lib.TrainState:
    """Reads the data, scores the base, and draws the adapter."""
    config, optimizer = self.config, self.settings.optimizer
    split = self.evaluation.tokens(self.data.splits["train"])
    pack = config.data.pack
    self.packing_efficiency = pipeline.packing_efficiency(split, seed=config.seed, pack=pack)
    self.display.log(f"train: {split.report}; rows {100 * self.packing_efficiency:.0f} % full")
    self.before = self._before() if self.generates else {}
    index, self._processes = self.shards.own_rows
    self._iterator = iter(
      pipeline.batches(
        split,
        batch_size=optimizer.batch_size,
        seed=config.seed,
        pack=pack,
        shard_index=index,
        shard_count=self._processes,
      )
    )
    state, self.frozen = self.shards.draw(
      self.model, self.base, optimizer, config.optimizer.learning_rate, config.seed
    )
    # Training gives up its state's memory: the start, which routing is compared with, is a copy.
    measured = self.model.adapter.has_router and config.eval.routing
    self.initial = jax.tree.map(jnp.copy, state.params) if measured else None
    self._update = language_shards.update(self.model, optimizer, self.shards)
    return state

  def batches(self, start: int, count: int) -> workload_lib.Batches:
    del start, count  # one step after another
    text = next(self._iterator)
    amount = self._processes * int((text.segment_ids > 0).sum())
    batch = self.shards.batch(text, self.table, self.settings.micro_batches)
    return workload_lib.Batches(batch, amount)

  def position(self) -> dict[str, Any]:
    return self._iterator.get_state()

  def seek(self, position: dict[str, Any]) -> None:
    self._iterator.set_state(position)

  def update(self, state, arrays):
    return self._update(state, self.frozen, arrays)

  def validate(self, state, step: int) -> list[dict[str, float]]:
    scores, every = {}, self.config.checkpoint.validate_every
    if every and (step == self.steps or step % every == 0):
      scores |= self.evaluation.likelihood(self.model, self._variables(state), during=True)
    every = self.config.eval.routing_every if self.generates and self.initial is not None else 0
    if every and step < self.steps and step % every == 0:
      scores |= self._routing_gain(state, during=True)
    return [scores]

  def _variables(self, state):
    return step_lib.variables(self.model, state.params, self.frozen)

  def _routing_gain(self, state, during: bool = False) -> dict[str, float]:
    return self.evaluation.routing_gain(self.model, state.params, self.initial, self.frozen, during)

  def evaluate(self, state, best: workload_lib.Best | None) -> dict[str, Any]:
    """Scores the trained model and writes its adapter."""
    config, variables = self.config, self._variables(state)
    after = self.evaluation.likelihood(self.model, variables)
    if self.initial is not None:
      after |= self._routing_gain(state)
    samples, before = [], dict(self.before)
    if self.generates:
      after |= self.evaluation.scores(self.model, variables)
      samples = language_evaluation.compare(
        before.pop(language_evaluation.ANSWERS, []), after.pop(language_evaluation.ANSWERS, [])
      )
    training = {
      "adapter": config.adapter.name,
      "trainable_params": self.settings.trainable_params,
      "learning_rate": config.optimizer.learning_rate,
      "seed": config.seed,
      "steps": self.steps,
      "packing_efficiency": self.packing_efficiency,
      "before": before,
      "after": after,
    }
    if best is not None:
      training["best"] = {"step": best.step, "validation/nats": best.objective}
      self._save(best.state.params, {**training, "steps": best.step}, BEST)
    diverged = not _finite(state.params)
    if diverged:
      self.display.log(f"{self.name}: the adapter is not finite; it is not written")
    else:
      self._save(state.params, training)
    row = {**self._row(before, after), "diverged": diverged}
    measured_last = {name: after[name] for name in routing_gain.COLUMNS if name in after}
    return {
      "last": [measured_last],
      "rows": [row],
      "samples": [{"trial_id": row["trial_id"], **sample} for sample in samples],
      "training": training,
    }

  def _row(self, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    config, (trial,) = self.config, self.cohort.trials
    row = {
      **workload_lib.result_row(self.cohort, trial, self.settings),
      "in_prompt": config.instruction.in_prompt,
      "shuffled": config.instruction.shuffled,
      "validation_nats": after.get("validation/nats", float("nan")),
    }
    for split in language_evaluation.SPLITS:
      for scores, prefix in ((before, "base_"), (after, "")):
        for score in ("accuracy", "nats"):
          if f"{split}/{score}" in scores:
            row[f"{prefix}{split}_{score}"] = scores[f"{split}/{score}"]
        row |= {
          f"{prefix}{name}": value
          for name, value in scores.items()
          if name.startswith(f"{split}/") and name.count("/") == 2
        }
    routed = ("router/", "routing/")
    row |= {name: value for name, value in after.items() if name.startswith(routed)}
    row["directory"] = str(self.directory.relative_to(self.shared))
    return row

  def _before(self) -> dict[str, float]:
    """Scores of the base; trials that ask it the same questions share them."""
    asked = {name: self.config[name].to_dict() for name in ("model", "data", "eval")}
    for name in ("routing", "routing_every"):  # the base has no router
      asked["eval"].pop(name)
    asked["in_prompt"] = self.config.instruction.in_prompt
    if asked["in_prompt"] and self.config.instruction.get("exchanged"):
      asked["exchanged"] = True
    text = json.dumps(asked, sort_keys=True, default=list)
    path = self.shared / f"before-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    if processes.agreed(path.exists()):
      return json.loads(path.read_text())
    self.display.log("the base, before training:")
    frozen = decoder.Decoder(self.model.config, _NO_ADAPTER)
    variables = {"base": self.base}
    scores = self.evaluation.likelihood(frozen, variables)
    scores |= self.evaluation.scores(frozen, variables)
    files.write_json(path, scores)
    return scores

  def _save(self, params, training: dict[str, Any], folder: str = ADAPTER) -> None:
    tree = {"params": serialization.to_state_dict(sharding.gathered(params))}
    if jax.tree.leaves(self.frozen.factors):
      tree["frozen"] = serialization.to_state_dict(sharding.gathered(self.frozen.factors))
    if self.projection:
      tree["projection"] = self.projection
    if not jax.tree.leaves(tree) or not processes.is_first():
      return  # nothing was trained, or another process writes it
    adapter_file.save(
      self.directory / folder,
      tree,
      {
        "adapter": dataclasses.asdict(self.model.adapter),
        "model_name": self.settings.source.name,
        "model_config": {
          "layers_per_block": self.model.config.layers_per_block,
          "adapted": list(self.model.config.adapted),
          "base_dtype": self.model.config.base_dtype,
          "dtype": self.model.config.dtype,
        },
        "base_fingerprint": self.settings.source.fingerprint,
        "instruction": self.config.instruction.to_dict(),
        "system": self.config.data.system,
        "template": self.config.data.get("template"),
        "training": training,
      },
    )


def _finite(tree) -> bool:
  return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


def publish(workdir: pathlib.Path, row: dict) -> pathlib.Path | None:
  """Copies a single trial's adapter, and its best step's, to `workdir`; None where none is."""
  trial, target = workdir / row["directory"], workdir / ADAPTER
  if not (trial / ADAPTER).is_dir():
    return None
  for name in (ADAPTER, BEST):
    if (trial / name).is_dir():
      shutil.copytree(trial / name, workdir / name, dirs_exist_ok=True)
  return target
