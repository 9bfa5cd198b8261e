"""Scores of a language model: likelihoods and generated answers of examples, routing statistics.

Letters as in `qlora_jax/typing.py`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax import numpy as jnp

from qlora_jax.adapters import statistics
from qlora_jax.data.text import formatting, pipeline, records, scoring
from qlora_jax.models import decoder, generation
from qlora_jax.training import progress, stop
from qlora_jax.training import step as step_lib
from qlora_jax.typing import PyTree
from qlora_jax.weights import chat
from qlora_jax.weights import tokenizer as tokenizer_lib
from qlora_jax.workloads import language_routing, language_shards, language_step, routing_gain

ANSWERS = "answers"  # in `Evaluation.scores`: what was said, for people to read
SPLITS = {"test": "new wordings", "test_seen": "known wordings"}
_STATISTICS = ("effective_support", "entropy", "max_share")
_SAMPLES = 3  # answers per task that a result keeps


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
  """What it takes to score any model on a trial's text.

  Attributes:
    config: of the trial.
    tokenizer: of the weights.
    data: the splits.
    table: embeddings of the instructions [instructions, E], or None.
    shards: of the trial's mesh.
    display: where scores are shown.
  """

  config: ml_collections.ConfigDict
  tokenizer: tokenizer_lib.Tokenizer
  data: records.TextData
  table: np.ndarray | None
  shards: language_shards.Shards
  display: progress.Display

  def tokens(self, examples: Iterable[records.Example]) -> pipeline.EncodedSplit:
    """Examples as tokens, fitted to the config's length."""
    return pipeline.encode(
      examples,
      self.tokenizer,
      self._render,
      length=self.config.data.length,
      on_long=self.config.data.on_long,
      instruction_in_prompt=self.config.instruction.in_prompt,
    )

  @functools.cached_property
  def _render(self) -> formatting.Render:
    data = self.config.data
    return formatting.renderer(self.tokenizer, data.system, data.get("template"))

  def scores(self, model: decoder.Decoder, variables: PyTree) -> dict[str, Any]:
    """Exact match by greedy generation on inputs that training did not see, by split and task.

    `answers` has what was said to the first few new wordings of each task.
    """
    measured: dict[str, Any] = {}
    for split, meaning in SPLITS.items():
      examples = some(self.data.splits.get(split, ()), self.config.eval.examples)
      if not examples:
        continue
      answers = self.answers(model, variables, examples)
      scores = scoring.accuracy(answers, examples)
      if split == "test":
        samples = some(
          zip(examples, answers, strict=True), _SAMPLES, task=lambda pair: pair[0].task
        )
        measured[ANSWERS] = [_sample(example, text) for example, text in samples]
      nats, _ = self.nats(model, variables, self.tokens(examples))
      self.display.log(
        f"{meaning}: exact match {100 * scores['accuracy']:.1f} %, {nats:.3f} nats per answer token"
      )
      measured |= {f"{split}/{name}": value for name, value in scores.items()}
      measured[f"{split}/nats"] = nats
    return measured

  def answers(
    self, model: decoder.Decoder, variables: PyTree, examples: Sequence[records.Example]
  ) -> list[str]:
    """What the model says to each example."""
    encoded = [
      formatting.encode_example(
        example,
        self.tokenizer,
        self._render,
        instruction_in_prompt=self.config.instruction.in_prompt,
      )
      for example in examples
    ]
    # Prompts of one length share a batch, so that little of it is padding.
    order = sorted(range(len(encoded)), key=lambda index: encoded[index].prompt_length)
    sampling = generation.SamplingConfig(max_tokens=self.config.eval.max_tokens)
    size, answers = self.config.eval.batch_size, []
    for start in range(0, len(encoded), size):
      stop.check()
      part = [encoded[index] for index in order[start : start + size]]
      part = part + [part[0]] * (size - len(part))  # one compiled batch size
      instruction = None
      if model.adapter.instruction_dim:
        instruction = self.table[[example_tokens.instruction_id for example_tokens in part]]
      with self.shards.use():
        texts = generation.generate(
          model,
          variables,
          [example_tokens.prompt for example_tokens in part],
          chat.stop_ids(self.tokenizer),
          sampling,
          instruction,
        )
      answers += [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in texts]
    return [text for _, text in sorted(zip(order, answers, strict=False))]

  def likelihood(
    self, model: decoder.Decoder, variables: PyTree, during: bool = False
  ) -> dict[str, float]:
    """Nats per answer token of the validation split, and how its tokens were routed.

    Args:
      during: of training: nothing is shown, and a request to stop waits for the checkpoint.
    """
    if "validation" not in self.data.splits:
      return {}
    examples = some(self.data.splits["validation"], self.config.eval.validation)
    nats, routing = self.nats(model, variables, self.tokens(examples), during)
    if not during:
      self.display.log(f"validation: {nats:.3f} nats per answer token")
    return {"validation/nats": nats, **{f"router/{k}": value for k, value in routing.items()}}

  def nats(
    self,
    model: decoder.Decoder,
    variables: PyTree,
    split: pipeline.EncodedSplit,
    during: bool = False,
  ) -> tuple[float, dict[str, float]]:
    """Nats per answer token, and the mean routing statistics of the batches."""
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
    means = {
      name: float(np.mean([batch_statistics[name] for batch_statistics in routing]))
      for name in routing[0]
    }
    return total / max(count, 1.0), means

  def routing_gain(
    self,
    model: decoder.Decoder,
    params: PyTree,
    initial: PyTree,
    frozen: step_lib.Frozen,
    during: bool = False,
  ) -> dict[str, float]:
    """`routing_gain.COLUMNS` in nats per answer token, on part of the validation split.

    Args:
      model: with a router.
      params, initial: the trained tree now and before the first step.
      frozen: what both share.
      during: of training: nothing is shown, and a request to stop waits for the checkpoint.
    """
    examples = some(self.data.splits.get("validation", ()), self.config.eval.routing)
    if len(examples) < 2:
      return {}
    # Shuffled, so that the examples of a batch, which exchange their weights, are of many tasks.
    order = np.random.default_rng(0).permutation(len(examples))
    split = self.tokens([examples[index] for index in order])
    texts = pipeline.packed_evaluation_batches(split, batch_size=self.config.optimizer.batch_size)
    check = (lambda: None) if during else stop.check
    gains = language_routing.gain(
      model, self.shards, self.table, texts, params, initial, frozen, check
    )
    if not during:
      shown = ", ".join(f"{gains[name]:+.4f} {name.split('_')[1]}" for name in routing_gain.GAINS)
      self.display.log(f"routing gain in nats per answer token against other weights: {shown}")
    return gains


def some(examples, count: int, task=lambda example: example.task) -> list:
  """The first `count` examples of every task, in their order."""
  counts: dict[str, int] = {}
  chosen = []
  for example in examples:
    name = task(example)
    counts[name] = counts.get(name, 0) + 1
    if counts[name] <= count:
      chosen.append(example)
  return chosen


def _sample(example, answer: str) -> dict[str, str]:
  return {
    "task": example.task,
    "instruction": example.instruction,
    "prompt": example.prompt,
    "expected": example.answers[0],
    "said": answer,
  }


def compare(before: list[dict], after: list[dict]) -> list[dict]:
  """The same questions as the base and then the adapted model answered them."""
  base_answers = {(sample["instruction"], sample["prompt"]): sample["said"] for sample in before}
  return [
    {
      **{name: text for name, text in sample.items() if name != "said"},
      "before": base_answers.get((sample["instruction"], sample["prompt"])),
      "after": sample["said"],
    }
    for sample in after
  ]


@functools.partial(jax.jit, static_argnums=0)
def _score_batch(model, variables, batches: language_step.LanguageBatch):
  batch = jax.tree.map(lambda leaf: leaf[0], batches)
  output = model.apply(variables, batch.tokens, batch.positions, batch.segments, batch.instruction)
  nats = language_step.answer_losses(model, variables, output.hidden, batch)
  routing = {}
  if output.routing.weights is not None:
    all_statistics = statistics.routing_statistics(output.routing.weights, batch.loss_mask)
    routing = {name: all_statistics[name] for name in _STATISTICS}
  return jnp.sum(nats * batch.weights), jnp.sum(batch.weights), routing
