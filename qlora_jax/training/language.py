"""Fine-tuning a language model: weights -> data -> adapter -> steps -> scores -> adapter file.

The optimiser, train step, checkpoints, metrics, progress and stopping are those of every run.
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import serialization
from jax import numpy as jnp

from qlora_jax import errors
from qlora_jax.adapters import factory, sizing, statistics
from qlora_jax.data.text import formatting, pipeline, scoring
from qlora_jax.instructions import cache, encoders, projection
from qlora_jax.models import decoder, families, generation
from qlora_jax.training import checkpoint, language_step, loop, metrics, progress, stop
from qlora_jax.training import optimizer as optimizer_lib
from qlora_jax.training import step as step_lib
from qlora_jax.weights import adapter_file, chat, hf_layout, source, sources

ADAPTER = "adapter"  # folder of the result in the work directory
_SPLITS = {"test": "new wordings", "test_seen": "known wordings"}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a config stands for, all of it checked.

  Attributes:
    source: the opened weights; model: decoder with its sized adapter; optimizer: of the run.
    trainable_params: count of the trained tree.
  """

  source: source.Source
  model: decoder.Decoder
  optimizer: optimizer_lib.OptimizerConfig
  trainable_params: int


def resolve(config: ml_collections.ConfigDict) -> Settings:
  """Validates a config, opens the weights and sizes the adapter.

  Raises:
    errors.UserError: one line that names the first field that is wrong.
  """
  optimizer = dict(config.optimizer)
  rate = optimizer.pop("learning_rate")
  if not 0 < rate < float("inf"):
    raise errors.UserError(f"optimizer.learning_rate: {rate} is not a finite number above 0")
  if config.instruction.encoder not in encoders.NAMES:
    raise errors.UserError(
      f"instruction.encoder: {config.instruction.encoder!r} is unknown; use one of"
      f" {', '.join(encoders.NAMES)}"
    )
  for section, name in (("data", "length"), ("eval", "every"), ("eval", "examples"),
                        ("eval", "max_tokens"), ("eval", "batch_size")):  # fmt: skip
    if config[section][name] < 1:
      raise errors.UserError(f"{section}.{name}: {config[section][name]} is not at least 1")
  opened = sources.open_source(config.model.weights)
  fields = {k: v for k, v in config.model.items() if k != "weights" and v is not None}
  if "adapted" in fields:
    fields["adapted"] = tuple(fields["adapted"])
  shape = families.config_from_hf(opened.config, **fields)
  overrides = dict(config.adapter)
  name, budget = overrides.pop("name"), overrides.pop("budget")
  base = decoder.abstract(shape)["base"]
  network = shape.network(sum(leaf.size for leaf in jax.tree.leaves(base)))
  adapter = factory.make(
    name, overrides, network, budget=budget, instruction_dim=config.instruction.dim
  )
  return Settings(
    opened, decoder.Decoder(shape, adapter), optimizer_lib.OptimizerConfig(**optimizer),
    sizing.count(adapter, network),
  )  # fmt: skip


def render_with(tokenizer) -> formatting.Render:
  """How a conversation becomes text: the model's chat template, or plain lines without one."""
  if not tokenizer.chat_template:
    return formatting.plain_render
  return lambda messages, add_generation_prompt: chat.render(
    tokenizer.chat_template, messages, add_generation_prompt, tokenizer.bos_token,
    tokenizer.eos_token,
  )  # fmt: skip


def stop_ids(tokenizer) -> list[int]:
  """Tokens that end an answer."""
  named = (tokenizer.token_id(name) for name in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>"))
  return sorted({token for token in (tokenizer.eos_id, *named) if token is not None})


class Run:
  """One fine-tuning run in one work directory."""

  def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
    self.config, self.workdir = config, workdir
    self.settings = resolve(config)
    self.model = self.settings.model
    self.tokenizer = self.settings.source.tokenizer()
    data = config.data
    self.data = pipeline.load(
      data.name, seed=config.seed, data_dir=data.data_dir, manual_folder=data.manual_folder,
      tasks=data.tasks, train_rows=data.train_rows,
    )  # fmt: skip
    self.table, self.projection = self._instructions()
    self.base = hf_layout.load_base(self.settings.source, self.model.config)

  def _instructions(self) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Embeddings [instructions, E] and the projection that made them, or None and {}."""
    if not self.model.adapter.uses_instruction:
      return None, {}
    texts = self.data.instruction_texts
    embedded = cache.embed(texts, self.config.instruction.encoder, self.workdir / "embeddings")
    seen = sorted({index for ids in self.data.seen_ids.values() for index in ids})
    fitted = projection.fit(embedded[seen], self.config.instruction.dim)
    table = projection.apply(fitted, embedded)
    if self.config.instruction.shuffled:  # the control: each task gets another task's instruction
      order = np.random.default_rng(self.config.seed).permutation(len(table))
      table = table[order]
    return table, {name: np.asarray(value) for name, value in fitted._asdict().items()}

  def encode(self, split: str) -> pipeline.EncodedSplit:
    return pipeline.encode(
      self.data.splits[split], self.tokenizer, render_with(self.tokenizer),
      length=self.config.data.length, on_long=self.config.data.on_long,
      instruction_in_prompt=self.config.instruction.in_prompt,
    )  # fmt: skip

  def train(self) -> dict[str, Any]:
    """Trains, scores, and writes adapter and `result.json`; goes on where a stopped run was."""
    done_file = self.workdir / "result.json"
    if done_file.exists():
      return json.loads(done_file.read_text())
    config, optimizer = self.config, self.settings.optimizer
    split = self.encode("train")
    efficiency = pipeline.packing_efficiency(split, seed=config.seed, pack=config.data.pack)
    with (
      progress.Display(total_points=1, unit="tokens") as display,
      metrics.MetricWriter(self.workdir) as writer,
    ):
      display.log(f"train: {split.report}; rows {100 * efficiency:.0f} % full")
      before = self._before(display)
      params, frozen = language_step.init_params(self.model, self.base, jax.random.key(config.seed))
      tx = optimizer_lib.make(optimizer)
      state = step_lib.TrainState(
        jnp.zeros((), jnp.int32), params, tx.init(params),
        jnp.float32(config.optimizer.learning_rate),
      )  # fmt: skip
      began, saved_at = time.monotonic(), time.monotonic()
      saved = checkpoint.restore(self.workdir / "checkpoints", state)
      done, state = saved if saved else (0, state)
      writer.truncate(done)
      batches = iter(pipeline.batches(
        split, batch_size=optimizer.batch_size, seed=config.seed, pack=config.data.pack
      ))  # fmt: skip
      for _ in range(done):  # the order is a function of the seed; passing over costs no model
        next(batches)
      update = jax.jit(
        functools.partial(step_lib.train_step, model=self.model, tx=tx, loss=language_step.loss_fn),
        donate_argnums=0,
      )
      label = f"{config.data.name}/{config.adapter.name}"
      tokens, losses, marked = 0, [], time.monotonic()
      with display.group(label, 1, optimizer.steps, start_step=done) as shown:
        while done < optimizer.steps:
          text = next(batches)
          state, values = update(state, frozen, language_step.from_text(text, self.table))
          done, tokens = done + 1, tokens + int((text.segment_ids > 0).sum())
          losses.append(values["train/loss"])
          last = done == optimizer.steps
          if done % config.eval.every == 0 or last or stop.requested():
            mean = float(np.mean(jax.device_get(losses)))  # waits for the steps
            rate = tokens / (time.monotonic() - marked)
            writer.write(done, {"train/loss": mean, "train/tokens_per_second": rate,
                                "train/grad_norm": float(values["train/grad_norm"])})  # fmt: skip
            shown.update(done, loss=mean, rate=rate)
            tokens, losses, marked = 0, [], time.monotonic()
            due = time.monotonic() - saved_at > config.checkpoint.seconds
            if last or due or stop.requested():
              writer.flush()
              checkpoint.save(self.workdir / "checkpoints", done, state)
              saved_at = time.monotonic()
              stop.check()
      after = self.scores(step_lib.variables(self.model, state.params, frozen), self.model, display)
      trained = time.monotonic() - began
    result = {
      "adapter": config.adapter.name, "trainable_params": self.settings.trainable_params,
      "learning_rate": config.optimizer.learning_rate, "seed": config.seed,
      "steps": optimizer.steps, "seconds": trained, "packing_efficiency": efficiency,
      "before": before, "after": after,
    }  # fmt: skip
    self._save(state.params, frozen, result)
    loop.write_json(done_file, result)
    return result

  def _before(self, display) -> dict[str, float]:
    """Scores of the base, once a work directory."""
    path = self.workdir / "before.json"
    if not path.exists():
      frozen = decoder.Decoder(self.model.config, factory.config_lib.AdapterConfig(method="none"))
      loop.write_json(path, self.scores({"base": self.base}, frozen, display))
    return json.loads(path.read_text())

  def scores(self, variables, model: decoder.Decoder, display) -> dict[str, float]:
    """Exact match by greedy generation on held-out inputs, and nats an answer token."""
    found: dict[str, float] = {}
    cfg = self.config.eval
    for split, meaning in _SPLITS.items():
      if split not in self.data.splits:
        continue
      examples = self._some(self.data.splits[split], cfg.examples)
      predictions = self.answers(variables, model, examples)
      scores = scoring.accuracy(predictions, examples)
      display.log(f"{meaning}: exact match {100 * scores['accuracy']:.1f} %")
      found |= {f"{split}/{name}": value for name, value in scores.items()}
    if "validation" in self.data.splits:
      found |= self._likelihood(variables, model)
      display.log(f"validation: {found['validation/nats']:.3f} nats an answer token")
    return found

  def _some(self, examples, count: int):
    """The first `count` examples of every task."""
    taken: dict[str, int] = {}
    kept = []
    for example in examples:
      taken[example.task] = taken.get(example.task, 0) + 1
      if taken[example.task] <= count:
        kept.append(example)
    return kept

  def answers(self, variables, model: decoder.Decoder, examples) -> list[str]:
    """What the model says to each example."""
    encoded = [
      formatting.encode_example(
        example, self.tokenizer, render_with(self.tokenizer),
        instruction_in_prompt=self.config.instruction.in_prompt,
      )
      for example in examples
    ]  # fmt: skip
    sampling = generation.SamplingConfig(max_tokens=self.config.eval.max_tokens)
    size, said = self.config.eval.batch_size, []
    for start in range(0, len(encoded), size):
      stop.check()
      part = encoded[start : start + size]
      part = part + [part[0]] * (size - len(part))  # one compiled batch size
      instruction = None
      if model.adapter.instruction_dim:
        instruction = self.table[[each.instruction_id for each in part]]
      texts = generation.generate(
        model, variables, [each.prompt for each in part], stop_ids(self.tokenizer), sampling,
        instruction,
      )  # fmt: skip
      said += [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in texts]
    return said[: len(encoded)]

  def _likelihood(self, variables, model: decoder.Decoder) -> dict[str, float]:
    total, count, routing = 0.0, 0.0, []
    for text, _ in pipeline.evaluation_batches(
      self.encode("validation"), batch_size=self.config.eval.batch_size
    ):
      table = self.table if model.adapter.instruction_dim else None
      batch = language_step.from_text(text, table)
      nats, number, stats = _score_batch(model, variables, batch)
      total, count = total + float(nats), count + float(number)
      routing.append(jax.device_get(stats))
    means = {name: float(np.mean([each[name] for each in routing])) for name in routing[0]}
    return {"validation/nats": total / max(count, 1.0),
            **{f"router/{name}": value for name, value in means.items()}}  # fmt: skip

  def _save(self, params, frozen, result) -> None:
    adapter = dataclasses.asdict(self.model.adapter)
    shape = {"layers_per_block": self.model.config.layers_per_block,
             "adapted": list(self.model.config.adapted)}  # fmt: skip
    tree = {"params": serialization.to_state_dict(jax.device_get(params))}
    if jax.tree.leaves(frozen.factors):
      tree["frozen"] = serialization.to_state_dict(jax.device_get(frozen.factors))
    if self.projection:
      tree["instruction"] = self.projection
    adapter_file.save(self.workdir / ADAPTER, tree, {
      "adapter": adapter, "model_name": self.settings.source.name, "model_config": shape,
      "base_fingerprint": self.settings.source.fingerprint,
      "instruction": self.config.instruction.to_dict(), "training": result,
    })  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _score_batch(model, variables, batch: language_step.LanguageBatch):
  output = model.apply(variables, batch.tokens, batch.positions, batch.segments, batch.instruction)
  each = language_step.answer_losses(model, variables, output.hidden, batch)
  found = {}
  if output.routing.weights is not None:
    every = statistics.routing_statistics(output.routing.weights, batch.loss_mask)
    found = {name: every[name] for name in ("effective_support", "entropy", "max_share")}
  return jnp.sum(each * batch.weights), jnp.sum(batch.weights), found
