"""One fine-tuning run: weights -> data -> adapter -> steps -> scores -> adapter folder.

The optimiser, train step, checkpoints, metrics, progress and stopping are those of every run; the
order of the data is a function of the seed, so that a stopped run goes on to the same adapter.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import serialization
from jax import numpy as jnp

from qlora_jax.adapters import config as adapter_config
from qlora_jax.adapters import statistics
from qlora_jax.data.text import formatting, pipeline, records, scoring
from qlora_jax.evaluation import routing as routing_lib
from qlora_jax.instructions import cache, projection
from qlora_jax.models import decoder, fast_attention, generation
from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.parallel import processes, sharding
from qlora_jax.training import (
  checkpoint,
  language_routing,
  language_settings,
  language_shards,
  language_step,
  loop,
  metrics,
  resume,
  stop,
)
from qlora_jax.training import step as step_lib
from qlora_jax.weights import adapter_file, chat, hf_layout

_ANSWERS = "answers"
ADAPTER = "adapter"  # folder of the result in a run's directory
BEST = "adapter_best"  # the step with the best validation likelihood, where it was measured
CHECKPOINTS = "checkpoints"
_SPLITS = {"test": "new wordings", "test_seen": "known wordings"}
_STATISTICS = ("effective_support", "entropy", "max_share")
_NO_ADAPTER = adapter_config.AdapterConfig(method="none")
_SAMPLES = 3  # answers of each task that a result keeps, for people to read


def render_with(
  tokenizer, system: str | None = None, template: str | None = None
) -> formatting.Render:
  """How a conversation becomes text: the model's chat template, or plain lines without one.

  Args:
    tokenizer: of the model.
    system: system message of conversations that have none; None leaves it to the template, which
      may write one of its own.
    template: text around a prompt instead of the model's chat template, with `{prompt}`.
  """
  if template is not None:
    return formatting.template_render(template, tokenizer.bos_token or "")

  def render(messages, add_generation_prompt):
    if system is not None and messages[0]["role"] != "system":
      messages = ({"role": "system", "content": system}, *messages)
    if not tokenizer.chat_template:
      return formatting.plain_render(messages, add_generation_prompt)
    return chat.render(
      tokenizer.chat_template, messages, add_generation_prompt, tokenizer.bos_token,
      tokenizer.eos_token,
    )  # fmt: skip

  return render


def stop_ids(tokenizer) -> list[int]:
  """Tokens that end an answer."""
  named = (tokenizer.token_id(name) for name in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>"))
  return sorted({token for token in (tokenizer.eos_id, *named) if token is not None})


@functools.lru_cache(maxsize=1)  # the runs of a sweep share one base
def _base(weights: str, shape: decoder.DecoderConfig, shards: language_shards.Shards):
  from qlora_jax.weights import sources

  placed = shards.variables(decoder.Decoder(shape, _NO_ADAPTER))["base"]
  return hf_layout.load_base(sources.open_source(weights), shape, placed)


class Run:
  """One run in one directory.

  Args:
    config: of kind `language`; its seed and learning rate are the run's.
    directory: of the run's checkpoints, metrics, adapter and result.
    shared: where runs keep what they have in common: embeddings, scores of the base.
    display: where progress is shown.
  """

  def __init__(
    self, config: ml_collections.ConfigDict, directory: pathlib.Path, shared: pathlib.Path, display
  ):
    self.config, self.directory, self.shared, self.display = config, directory, shared, display
    self.settings = language_settings.resolve(config)
    self.model = self.settings.model
    fast_attention.check(self.model.config.attention, jax.default_backend())
    layout = mesh_lib.from_config(config.mesh)
    self.shards = language_shards.Shards(mesh_lib.make(layout), layout.rules)
    mesh_lib.check_batch(self.shards.mesh, config.optimizer.batch_size, self.settings.micro_batches)
    self.tokenizer = self.settings.source.tokenizer()
    self.tokenizer.check_vocab(self.model.config.vocabulary)
    data = config.data
    with processes.in_turn():  # prepared data and embeddings are kept in files
      self.data = pipeline.load(
        data.name, seed=config.seed, data_dir=data.data_dir, manual_folder=data.manual_folder,
        tasks=data.tasks, train_rows=data.train_rows,
      )  # fmt: skip
      if config.instruction.get("exchanged"):
        self.data = records.exchanged(self.data, seed=config.seed)
      self.table, self.projection = self._instructions()
    self.base = _base(config.model.weights, self.model.config, self.shards)

  def _instructions(self) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Embeddings [instructions, E] and the projection that made them, or None and {}."""
    if not self.model.adapter.uses_instruction:
      return None, {}
    texts = [text or " " for text in self.data.instruction_texts]
    embedded = cache.embed(texts, self.config.instruction.encoder, self.shared / "embeddings")
    seen = sorted({index for ids in self.data.seen_ids.values() for index in ids})
    fitted = projection.fit(embedded[seen], self.config.instruction.dim)
    table = projection.apply(fitted, embedded)
    if self.config.instruction.shuffled:  # the control: wordings of all tasks change places
      table = table[np.random.default_rng(self.config.seed).permutation(len(table))]
    return table, {name: np.asarray(value) for name, value in fitted._asdict().items()}

  def encode(self, split: str) -> pipeline.EncodedSplit:
    """A split as tokens, fitted to the config's length; of the validation split only a part."""
    examples = self.data.splits[split]
    if split == "validation":
      examples = some(examples, self.config.eval.validation)
    return self._tokens(examples)

  def _tokens(self, examples) -> pipeline.EncodedSplit:
    return pipeline.encode(
      examples, self.tokenizer, self._render(),
      length=self.config.data.length, on_long=self.config.data.on_long,
      instruction_in_prompt=self.config.instruction.in_prompt,
    )  # fmt: skip

  def _render(self) -> formatting.Render:
    data = self.config.data
    return render_with(self.tokenizer, data.system, data.get("template"))

  def train(self, label: str, by_generation: bool = True) -> dict[str, Any]:
    """Trains, scores, and writes adapter and `result.json`; goes on where a stopped run was.

    Args:
      label: names the run where progress is shown.
      by_generation: whether answers are generated before and after, or likelihoods taken only.
    """
    done_file = self.directory / "result.json"
    if processes.agreed(done_file.exists()):
      self._remove_checkpoints()  # killed before it could
      return json.loads(done_file.read_text())
    config, optimizer = self.config, self.settings.optimizer
    split = self.encode("train")
    efficiency = pipeline.packing_efficiency(split, seed=config.seed, pack=config.data.pack)
    self.display.log(f"train: {split.report}; rows {100 * efficiency:.0f} % full")
    before = self._before() if by_generation else {}
    began = time.monotonic()
    state, frozen = self.shards.draw(
      self.model, self.base, optimizer, config.optimizer.learning_rate, config.seed
    )
    # Training gives up its state's memory: the start, which routing is compared with, is a copy.
    measured = self.model.adapter.has_router and config.eval.routing
    initial = jax.tree.map(jnp.copy, state.params) if measured else None
    with metrics.MetricWriter(processes.own_directory(self.directory)) as writer:
      state, best = self._fit(
        label, split, state, frozen, writer, initial if by_generation else None
      )
    variables = step_lib.variables(self.model, state.params, frozen)
    result = {
      "adapter": config.adapter.name, "trainable_params": self.settings.trainable_params,
      "learning_rate": config.optimizer.learning_rate, "seed": config.seed,
      "steps": optimizer.steps, "packing_efficiency": efficiency, "before": before,
      "after": self._likelihood(variables, self.model),
    }  # fmt: skip
    if initial is not None:
      result["after"] |= self.routing_gain(state.params, initial, frozen)
    if by_generation:
      result["after"] |= self.scores(variables, self.model)
      result["samples"] = _compare(before.pop(_ANSWERS, []), result["after"].pop(_ANSWERS, []))
    result["seconds"] = time.monotonic() - began
    if best is not None:
      result["best"] = {"step": best.step, "validation/nats": best.extra["validation/nats"]}
      self._save(best.tree.params, frozen, {**result, "steps": best.step}, BEST)
    self._save(state.params, frozen, result)
    loop.write_json(done_file, result)
    self._remove_checkpoints()
    return result

  def _remove_checkpoints(self) -> None:
    if processes.is_first():
      shutil.rmtree(self.directory / CHECKPOINTS, ignore_errors=True)

  def _fit(
    self, label, split, state, frozen, writer, initial
  ) -> tuple[step_lib.TrainState, checkpoint.Restored | None]:
    """Trains to the last step; returns its state, and the best one's where it was measured.

    What the routing gains is measured on the way against `initial`, where that is given.
    """
    config, optimizer, parts = self.config, self.settings.optimizer, self.settings.micro_batches
    every = config.checkpoint.validate_every
    index, count = self.shards.own_rows
    batches = iter(pipeline.batches(
      split, batch_size=optimizer.batch_size, seed=config.seed, pack=config.data.pack,
      shard_index=index, shard_count=count,
    ))  # fmt: skip
    update = language_shards.update(self.model, optimizer, self.shards)
    done, tokens, losses = 0, 0, []
    with checkpoint.Checkpointer(
      self.directory / CHECKPOINTS, keep=config.checkpoint.keep,
      keep_best=config.checkpoint.keep_best, config=resume.plain(config), log=self.display.log,
    ) as saver:  # fmt: skip
      if saved := saver.restore(state):
        done, state = saved.step, saved.tree
        batches.set_state(saved.extra["data"])
        losses = [np.float32(loss) for loss in saved.extra["losses"]]
      writer.truncate(done)
      least = (saver.best() or (0, np.inf))[1]
      marked = saved_at = time.monotonic()
      with self.display.group(label, 1, optimizer.steps, start_step=done) as shown:
        while done < optimizer.steps:
          text = next(batches)
          state, values = update(state, frozen, self.shards.batch(text, self.table, parts))
          done, tokens = done + 1, tokens + count * int((text.segment_ids > 0).sum())
          losses.append(values["train/loss"])
          last = done == optimizer.steps
          noted = last or done % config.eval.every == 0
          # One process stops after any step, several where all of them ask each other.
          if not noted and not (jax.process_count() == 1 and stop.requested()):
            continue
          losses, nats = jax.device_get(losses), None  # waits for the steps
          if noted:
            scalars = {
              "train/loss": np.mean(losses), "train/grad_norm": values["train/grad_norm"],
              "train/tokens_per_second": tokens / (time.monotonic() - marked),
            }  # fmt: skip
            if every and (last or done % every == 0):
              variables = step_lib.variables(self.model, state.params, frozen)
              scalars |= self._likelihood(variables, self.model, during=True)
              nats = scalars.get("validation/nats")
            routing_every = config.eval.routing_every
            if initial is not None and routing_every and not last and done % routing_every == 0:
              scalars |= self.routing_gain(state.params, initial, frozen, during=True)
            writer.write(done, scalars)
            shown.update(done, loss=scalars["train/loss"], rate=scalars["train/tokens_per_second"])
            losses = []
          better = nats is not None and nats < least and config.checkpoint.keep_best > 0
          asked, due = checkpoint.agree(
            int(stop.requested() or 0), time.monotonic() - saved_at > config.checkpoint.seconds
          )
          if last or asked or due or better:
            writer.flush()
            saver.save(done, state, {
              "data": batches.get_state(), "losses": [float(loss) for loss in losses],
              "validation/nats": nats,
            }, metric=nats)  # fmt: skip
            saved_at, least = time.monotonic(), nats if better else least
          if asked:
            saver.wait()
            raise stop.Stopped(asked)
          tokens, marked = 0, time.monotonic()
      return state, saver.restore_best(state)

  def _before(self) -> dict[str, float]:
    """Scores of the base; runs that ask it the same questions share them."""
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
    found = self._likelihood(variables, frozen) | self.scores(variables, frozen)
    loop.write_json(path, found)
    return found

  def scores(self, variables, model: decoder.Decoder) -> dict[str, Any]:
    """Exact match by greedy generation on inputs that training did not see, by split and task.

    `answers` has what was said to the first few new wordings of each task.
    """
    found: dict[str, Any] = {}
    for split, meaning in _SPLITS.items():
      examples = some(self.data.splits.get(split, ()), self.config.eval.examples)
      if not examples:
        continue
      said = self.answers(variables, model, examples)
      scores = scoring.accuracy(said, examples)
      if split == "test":
        kept = some(zip(examples, said, strict=True), _SAMPLES, task=lambda pair: pair[0].task)
        found[_ANSWERS] = [_sample(example, text) for example, text in kept]
      nats, _ = self._nats(variables, model, self._tokens(examples))
      self.display.log(
        f"{meaning}: exact match {100 * scores['accuracy']:.1f} %, {nats:.3f} nats an answer token"
      )
      found |= {f"{split}/{name}": value for name, value in scores.items()}
      found[f"{split}/nats"] = nats
    return found

  def answers(self, variables, model: decoder.Decoder, examples) -> list[str]:
    """What the model says to each example."""
    render = self._render()
    encoded = [
      formatting.encode_example(
        example, self.tokenizer, render, instruction_in_prompt=self.config.instruction.in_prompt
      )
      for example in examples
    ]
    # Prompts of one length share a batch, so that little of it is padding.
    order = sorted(range(len(encoded)), key=lambda index: encoded[index].prompt_length)
    sampling = generation.SamplingConfig(max_tokens=self.config.eval.max_tokens)
    size, said = self.config.eval.batch_size, []
    for start in range(0, len(encoded), size):
      stop.check()
      part = [encoded[index] for index in order[start : start + size]]
      part = part + [part[0]] * (size - len(part))  # one compiled batch size
      instruction = None
      if model.adapter.instruction_dim:
        instruction = self.table[[each.instruction_id for each in part]]
      with self.shards.use():
        texts = generation.generate(
          model, variables, [each.prompt for each in part], stop_ids(self.tokenizer), sampling,
          instruction,
        )  # fmt: skip
      said += [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in texts]
    return [text for _, text in sorted(zip(order, said, strict=False))]

  def _likelihood(
    self, variables, model: decoder.Decoder, during: bool = False
  ) -> dict[str, float]:
    """Nats an answer token of the validation split, and how its tokens were routed.

    Args:
      during: of training: nothing is shown, and a request to stop waits for the checkpoint.
    """
    if "validation" not in self.data.splits:
      return {}
    nats, routing = self._nats(variables, model, self.encode("validation"), during)
    if not during:
      self.display.log(f"validation: {nats:.3f} nats an answer token")
    return {"validation/nats": nats, **{f"router/{k}": value for k, value in routing.items()}}

  def _nats(
    self, variables, model, split: pipeline.EncodedSplit, during: bool = False
  ) -> tuple[float, dict[str, float]]:
    """Nats an answer token, and the mean routing statistics of the batches."""
    total, count, routing = 0.0, 0.0, []
    for text in pipeline.packed_evaluation_batches(
      split, batch_size=self.config.optimizer.batch_size
    ):
      if not during:
        stop.check()
      table = self.table if model.adapter.instruction_dim else None
      batch = self.shards.batch(self.shards.share(text), table)
      with self.shards.use():
        nats, number, stats = _score_batch(model, variables, batch)
      total, count = total + float(nats), count + float(number)
      routing.append(jax.device_get(stats))
    means = {name: float(np.mean([each[name] for each in routing])) for name in routing[0]}
    return total / max(count, 1.0), means

  def routing_gain(
    self, params, initial, frozen: step_lib.Frozen, during: bool = False
  ) -> dict[str, float]:
    """`evaluation.routing.COLUMNS` in nats per answer token, on part of the validation split.

    Args:
      params, initial: the trained tree now and before the first step.
      frozen: what both share.
      during: of training: nothing is shown, and a request to stop waits for the checkpoint.
    """
    examples = some(self.data.splits.get("validation", ()), self.config.eval.routing)
    if len(examples) < 2:
      return {}
    # Shuffled, so that the examples of a batch, which exchange their weights, are of many tasks.
    order = np.random.default_rng(0).permutation(len(examples))
    split = self._tokens([examples[index] for index in order])
    texts = pipeline.packed_evaluation_batches(split, batch_size=self.config.optimizer.batch_size)
    gains = language_routing.gain(
      self.model, self.shards, self.table, texts, params, initial, frozen,
      check=(lambda: None) if during else stop.check,
    )  # fmt: skip
    if not during:
      shown = ", ".join(f"{gains[name]:+.4f} {name.split('_')[1]}" for name in routing_lib.GAINS)
      self.display.log(f"routing gain in nats per answer token against other weights: {shown}")
    return gains

  def _save(self, params, frozen, result, folder: str = ADAPTER) -> None:
    tree = {"params": serialization.to_state_dict(sharding.gathered(params))}
    if jax.tree.leaves(frozen.factors):
      tree["frozen"] = serialization.to_state_dict(sharding.gathered(frozen.factors))
    if self.projection:
      tree["projection"] = self.projection
    if not jax.tree.leaves(tree) or not processes.is_first():
      return  # nothing was trained, or another process writes it
    adapter_file.save(self.directory / folder, tree, {
      "adapter": dataclasses.asdict(self.model.adapter),
      "model_name": self.settings.source.name,
      "model_config": {
        "layers_per_block": self.model.config.layers_per_block,
        "adapted": list(self.model.config.adapted),
        "base_dtype": self.model.config.base_dtype, "dtype": self.model.config.dtype,
      },
      "base_fingerprint": self.settings.source.fingerprint,
      "instruction": self.config.instruction.to_dict(), "system": self.config.data.system,
      "template": self.config.data.get("template"),
      "training": result,
    })  # fmt: skip


def some(examples, count: int, task=lambda example: example.task) -> list:
  """The first `count` examples of every task, in their order."""
  taken: dict[str, int] = {}
  kept = []
  for example in examples:
    name = task(example)
    taken[name] = taken.get(name, 0) + 1
    if taken[name] <= count:
      kept.append(example)
  return kept


def _sample(example, said: str) -> dict[str, str]:
  return {
    "task": example.task, "instruction": example.instruction, "prompt": example.prompt,
    "expected": example.answers[0], "said": said,
  }  # fmt: skip


def _compare(before: list[dict], after: list[dict]) -> list[dict]:
  """The same questions as the base and then the adapted model answered them."""
  said = {(each["instruction"], each["prompt"]): each["said"] for each in before}
  return [
    {**{name: text for name, text in each.items() if name != "said"},
     "before": said.get((each["instruction"], each["prompt"])), "after": each["said"]}
    for each in after
  ]  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _score_batch(model, variables, batches: language_step.LanguageBatch):
  batch = jax.tree.map(lambda leaf: leaf[0], batches)
  output = model.apply(variables, batch.tokens, batch.positions, batch.segments, batch.instruction)
  each = language_step.answer_losses(model, variables, output.hidden, batch)
  found = {}
  if output.routing.weights is not None:
    every = statistics.routing_statistics(output.routing.weights, batch.loss_mask)
    found = {name: every[name] for name in _STATISTICS}
  return jnp.sum(each * batch.weights), jnp.sum(batch.weights), found
