"""The common record of every text data set, and the assignment of instructions to rows.

A *row* is a question with its accepted answers. An *example* is a row with one wording of the
task's instruction. Training and validation examples have *seen* wordings, and `test` examples have
*held-out* ones. `test_seen` repeats the test rows with seen wordings, which separates the effect of
a new wording from the effect of a new input.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from qlora_jax import errors

Message = Mapping[str, str]  # keys 'role' and 'content', as chat templates expect


@dataclasses.dataclass(frozen=True)
class Example:
  """One question, one instruction and every accepted answer.

  Attributes:
    instruction: the instruction's text; can be empty in user data.
    prompt: the input without the instruction.
    answers: accepted answers, at least one; the first is the training target.
    task: name of the task, under which scores are reported.
    paraphrase_id: row of `instruction` in `TextData.instruction_texts`.
    messages: for chat data the whole conversation, which ends with the assistant. It replaces
      instruction and prompt.
    source: origin of the example (file and line), for error messages.
  """

  instruction: str
  prompt: str
  answers: tuple[str, ...]
  task: str
  paraphrase_id: int
  messages: tuple[Message, ...] | None = None
  source: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
  """A question and its accepted answers, without an instruction."""

  task: str
  prompt: str
  answers: tuple[str, ...]
  source: str = ""


@dataclasses.dataclass(frozen=True)
class Wordings:
  """The wordings of one task's instruction; no text is both seen and held out."""

  seen: tuple[str, ...]
  heldout: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TextData:
  """A data set in memory.

  Attributes:
    name: the data set's name, or the path of the file or folder.
    splits: examples by split: 'train', and optionally 'validation', 'test' and 'test_seen'.
    instruction_texts: all instructions. `Example.paraphrase_id` and the pipeline's
      `instruction_id` are row numbers of it. `qlora_jax.instructions.cache.embed` embeds it.
    seen_ids, heldout_ids: row numbers of `instruction_texts` by task.
  """

  name: str
  splits: dict[str, tuple[Example, ...]]
  instruction_texts: tuple[str, ...]
  seen_ids: dict[str, tuple[int, ...]]
  heldout_ids: dict[str, tuple[int, ...]]

  @property
  def task_names(self) -> tuple[str, ...]:
    return tuple(self.seen_ids)


def stream(*keys: str, seed: int = 0) -> np.random.Generator:
  """A generator that depends only on the keys and the seed.

  Raises:
    UserError: a negative seed.
  """
  if seed < 0:
    raise errors.UserError(f"data seed is {seed}; it must be at least 0")
  return np.random.default_rng([zlib.crc32("/".join(keys).encode()), seed])


def choose_tasks(
  tasks: Sequence[str] | None, known: Sequence[str], data_set: str
) -> tuple[str, ...]:
  """Returns the selected tasks, or all for None.

  Raises:
    UserError: an unknown task or an empty selection; the message lists the known tasks.
  """
  if tasks is None:
    return tuple(known)
  if isinstance(tasks, str):
    tasks = (tasks,)
  for task in tasks:
    if task not in known:
      raise errors.UserError(f"unknown task {task!r} of {data_set}; known: {', '.join(known)}")
  if not tasks:
    raise errors.UserError(f"tasks of {data_set} is empty; known: {', '.join(known)}")
  return tuple(dict.fromkeys(tasks))


def split_wordings(texts: Sequence[str]) -> Wordings:
  """Divides texts into seen and held-out ones; the last third, at least one, is held out.

  Of texts that differ only in case, spaces or final punctuation, the first is used.

  Raises:
    UserError: fewer than two distinct texts.
  """
  first_by_key = {
    " ".join(text.casefold().split()).rstrip(" .?!:"): text for text in reversed(texts)
  }
  distinct = tuple(text for text in texts if text in first_by_key.values())
  distinct = tuple(dict.fromkeys(distinct))
  if len(distinct) < 2:
    raise errors.UserError(f"needs at least two distinct instructions, has {list(texts)!r}")
  num_heldout = max(1, len(distinct) // 3)
  return Wordings(distinct[:-num_heldout], distinct[-num_heldout:])


def take_validation(
  rows: Sequence[Row], share: float, max_prompts: int, key: str
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
  """Moves a fixed part of training rows to validation; rows with equal prompts stay together.

  Args:
    rows: training rows of one task.
    share: fraction of the distinct prompts to move; at least one prompt if there are two or more.
    max_prompts: maximum number of prompts to move.
    key: key of the draw, which depends only on the key and the rows.

  Returns:
    Training rows and validation rows, in their order.
  """
  prompts = tuple(dict.fromkeys(row.prompt for row in rows))
  if len(prompts) < 2:
    return tuple(rows), ()
  num_prompts = min(max_prompts, max(1, round(share * len(prompts))))
  validation_prompts = {
    prompts[i] for i in stream("validation", key).permutation(len(prompts))[:num_prompts]
  }
  train = tuple(row for row in rows if row.prompt not in validation_prompts)
  return train, tuple(row for row in rows if row.prompt in validation_prompts)


def assemble(
  name: str,
  rows: Mapping[str, Sequence[Row]],
  wordings: Mapping[str, Wordings],
  *,
  seed: int,
  train_rows: int | None = None,
) -> TextData:
  """Assigns instructions to rows and shuffles the training examples.

  Args:
    name: the data set's name.
    rows: 'train', 'validation' and 'test' rows.
    wordings: the instructions by task.
    seed: draws the training rows, their order, and the wordings of training and validation. Test
      examples are the same for every seed.
    train_rows: maximum number of training rows per task; None for all.

  Raises:
    UserError: a negative seed, or `train_rows` below 1.
  """
  if train_rows is not None and train_rows < 1:
    raise errors.UserError(f"train_rows is {train_rows}; it must be at least 1")
  texts, seen_ids, heldout_ids = [], {}, {}
  for task, wording in wordings.items():
    first_seen, first_heldout = len(texts), len(texts) + len(wording.seen)
    texts += (*wording.seen, *wording.heldout)
    seen_ids[task] = tuple(range(first_seen, first_heldout))
    heldout_ids[task] = tuple(range(first_heldout, len(texts)))
  sources = {
    "train": ("train", seen_ids, seed),
    "validation": ("validation", seen_ids, seed),
    "test": ("test", heldout_ids, 0),
    "test_seen": ("test", seen_ids, 0),
  }
  splits = {}
  for split, (row_split, ids, split_seed) in sources.items():
    rng = stream(name, split, seed=split_seed)
    examples = []
    for task in wordings:
      task_rows = [row for row in rows[row_split] if row.task == task]
      if split == "train" and train_rows is not None:
        task_rows = [task_rows[i] for i in np.sort(rng.permutation(len(task_rows))[:train_rows])]
      wording_of_row = rng.permutation(np.arange(len(task_rows)) % len(ids[task]))
      examples += [
        Example(
          instruction=texts[ids[task][i]],
          prompt=row.prompt,
          answers=row.answers,
          task=task,
          paraphrase_id=ids[task][i],
          source=row.source,
        )
        for row, i in zip(task_rows, wording_of_row, strict=True)
      ]
    if split == "train":
      examples = [examples[i] for i in rng.permutation(len(examples))]
    splits[split] = tuple(examples)
  return TextData(name, splits, tuple(texts), seen_ids, heldout_ids)


def exchanged(data: TextData, *, seed: int) -> TextData:
  """Control of the instruction: permutes the wordings within each split at random.

  A row's wording no longer depends on the row's task. The instruction, as text or as an embedding,
  therefore has no information about the task. The permutation of the test rows is the same for
  every seed.
  """
  splits = {}
  for split, examples in data.splits.items():
    rng = stream("exchanged", split, seed=0 if split.startswith("test") else seed)
    splits[split] = tuple(
      dataclasses.replace(
        example,
        instruction=examples[other].instruction,
        paraphrase_id=examples[other].paraphrase_id,
      )
      for example, other in zip(examples, rng.permutation(len(examples)), strict=True)
    )
  return dataclasses.replace(data, splits=splits)
