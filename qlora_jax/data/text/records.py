"""The common record of every text data set, and how instructions are dealt out to its rows.

A *row* is a question with its accepted answers. An *example* is a row with one wording of its
task's instruction. Training and validation examples carry *seen* wordings, `test` carries
*held-out* ones, and `test_seen` repeats the test rows with seen wordings, so that the cost of a
new wording can be told from the cost of a new input.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from qlora_jax import errors

Message = Mapping[str, str]  # 'role' and 'content', as chat templates expect them


@dataclasses.dataclass(frozen=True)
class Example:
  """One question, one instruction and every accepted answer.

  Attributes:
    instruction: the instruction's text; may be empty for a user's own data.
    prompt: the input without the instruction.
    answers: accepted answers, at least one; the first is the one to train on.
    task: name of the task, under which scores are reported.
    paraphrase_id: row of `TextData.instruction_texts` that holds `instruction`.
    messages: the whole conversation, ending with the assistant, where the data are chats. It
      takes the place of instruction and prompt.
    source: where the example came from (file and line), for error messages.
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
  """A question and its accepted answers, before an instruction is drawn for it."""

  task: str
  prompt: str
  answers: tuple[str, ...]
  source: str = ""


@dataclasses.dataclass(frozen=True)
class Wordings:
  """The texts of one task's instruction; no text is in both."""

  seen: tuple[str, ...]
  heldout: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TextData:
  """A data set in memory.

  Attributes:
    name: the data set's name, or the path it was read from.
    splits: examples by split: 'train', and where there are any 'validation', 'test' and
      'test_seen'.
    instruction_texts: every instruction; `Example.paraphrase_id` and the pipeline's
      `instruction_id` are rows of it. Embed it with `qlora_jax.instructions.cache.embed`.
    seen_ids, heldout_ids: rows of `instruction_texts` for each task.
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
  """A generator that depends on the keys and the seed alone.

  Raises:
    UserError: a negative seed.
  """
  if seed < 0:
    raise errors.UserError(f"data seed is {seed}; it must be at least 0")
  return np.random.default_rng([zlib.crc32("/".join(keys).encode()), seed])


def choose_tasks(
  tasks: Sequence[str] | None, known: Sequence[str], data_set: str
) -> tuple[str, ...]:
  """Returns the tasks asked for, or all; an unknown or an empty choice is a UserError."""
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
  """Divides texts into seen and held-out ones: the last third, at least one, is held out.

  Texts that differ only in case, spaces or final punctuation count as one; the first is kept.

  Raises:
    UserError: fewer than two different texts.
  """
  different = {" ".join(text.casefold().split()).rstrip(" .?!:"): text for text in reversed(texts)}
  kept = tuple(text for text in texts if text in different.values())
  kept = tuple(dict.fromkeys(kept))
  if len(kept) < 2:
    raise errors.UserError(f"needs two different instructions at least, has {list(texts)!r}")
  num_heldout = max(1, len(kept) // 3)
  return Wordings(kept[:-num_heldout], kept[-num_heldout:])


def take_validation(
  rows: Sequence[Row], share: float, most: int, key: str
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
  """Takes a fixed validation part from training rows; rows with one prompt stay together.

  Args:
    rows: training rows of one task.
    share: share of the different prompts to take; at least one where there are two or more.
    most: at most so many prompts.
    key: names the draw, which depends on nothing else but the rows.

  Returns:
    Training rows and validation rows, in their order.
  """
  prompts = tuple(dict.fromkeys(row.prompt for row in rows))
  if len(prompts) < 2:
    return tuple(rows), ()
  number = min(most, max(1, round(share * len(prompts))))
  taken = {prompts[i] for i in stream("validation", key).permutation(len(prompts))[:number]}
  train = tuple(row for row in rows if row.prompt not in taken)
  return train, tuple(row for row in rows if row.prompt in taken)


def assemble(
  name: str,
  rows: Mapping[str, Sequence[Row]],
  wordings: Mapping[str, Wordings],
  *,
  seed: int,
  train_rows: int | None = None,
) -> TextData:
  """Deals out instructions to rows and shuffles them.

  Args:
    name: the data set's name.
    rows: 'train', 'validation' and 'test' rows.
    wordings: the instructions of each task.
    seed: draws the training rows kept, their order and the wordings of training and validation.
      Test examples are the same for every seed.
    train_rows: at most so many training rows a task; None for all.

  Raises:
    UserError: a negative seed, or `train_rows` below one.
  """
  if train_rows is not None and train_rows < 1:
    raise errors.UserError(f"train_rows is {train_rows}; it must be at least 1")
  texts, seen_ids, heldout_ids = [], {}, {}
  for task, wording in wordings.items():
    first, middle = len(texts), len(texts) + len(wording.seen)
    texts += (*wording.seen, *wording.heldout)
    seen_ids[task] = tuple(range(first, middle))
    heldout_ids[task] = tuple(range(middle, len(texts)))
  sources = {
    "train": ("train", seen_ids, seed),
    "validation": ("validation", seen_ids, seed),
    "test": ("test", heldout_ids, 0),
    "test_seen": ("test", seen_ids, 0),
  }
  splits = {}
  for split, (part, ids, split_seed) in sources.items():
    rng = stream(name, split, seed=split_seed)
    chosen = []
    for task in wordings:
      task_rows = [row for row in rows[part] if row.task == task]
      if split == "train" and train_rows is not None:
        task_rows = [task_rows[i] for i in np.sort(rng.permutation(len(task_rows))[:train_rows])]
      dealt = rng.permutation(np.arange(len(task_rows)) % len(ids[task]))
      chosen += [
        Example(
          instruction=texts[ids[task][i]],
          prompt=row.prompt,
          answers=row.answers,
          task=task,
          paraphrase_id=ids[task][i],
          source=row.source,
        )
        for row, i in zip(task_rows, dealt, strict=True)
      ]
    if split == "train":
      chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    splits[split] = tuple(chosen)
  return TextData(name, splits, tuple(texts), seen_ids, heldout_ids)


def exchanged(data: TextData, *, seed: int) -> TextData:
  """The control of a task's instruction: within each split the rows exchange their wordings.

  A row's own task is left to chance, so that the instruction says nothing about it, in words or as
  a vector. Test rows are exchanged alike for every seed.
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
