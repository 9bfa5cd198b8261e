"""Text data for training: a data set by name, tokenised splits, and batches in a fixed order.

    load --> TextData --encode--> EncodedSplit --batches--> grain.IterDataset of TextBatch

The order is a pure function of the seed. Every process plans the rows of the global batch, and
builds only its part. The global batches therefore do not depend on the number of processes: the
parts of all processes, concatenated, are the batch of a single process.
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from qlora_jax import errors
from qlora_jax.data import order
from qlora_jax.data.text import (
  formatting,
  gsm8k,
  instruction_induction,
  jsonl,
  packing,
  records,
  word_tasks,
)

TextBatch = packing.TextBatch
_ARGUMENTS = ("tasks", "data_dir", "manual_folder")


@dataclasses.dataclass(frozen=True)
class DataSet:
  """A data set that `load` knows by name.

  Attributes:
    load: called with `seed`, `train_rows` and the arguments in `takes`; returns
      `records.TextData`, for instance from `records.assemble`.
    takes: those of 'tasks', 'data_dir' and 'manual_folder' that `load` accepts. A user who sets
      another one gets an error.
  """

  load: Callable[..., records.TextData]
  takes: tuple[str, ...] = ()


_DATA_SETS: dict[str, DataSet] = {}


def register(name: str, load: Callable[..., records.TextData], takes: Sequence[str] = ()) -> None:
  """Registers a data set under `name`, for `config.data.name` and `load`.

  Raises:
    ValueError: the name is registered already, or `takes` has an unknown argument.
  """
  if name in _DATA_SETS:
    raise ValueError(f"a data set {name!r} is registered already")
  if unknown := sorted(set(takes) - set(_ARGUMENTS)):
    raise ValueError(f"data set {name!r} takes {unknown[0]!r}; use any of {', '.join(_ARGUMENTS)}")
  _DATA_SETS[name] = DataSet(load, tuple(takes))


def names() -> tuple[str, ...]:
  """Names of the registered data sets."""
  return tuple(_DATA_SETS)


register("word_tasks", word_tasks.load, takes=("tasks",))
register("instruction_induction", instruction_induction.load, takes=_ARGUMENTS)
register("gsm8k", gsm8k.load, takes=("data_dir", "manual_folder"))


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSplit:
  """A tokenised split; every example fits a row.

  Attributes:
    examples: tokenised examples.
    length: T, the places of a row.
    pad_id: token of padding.
    report: counts of truncated and dropped examples.
  """

  examples: tuple[formatting.Encoded, ...]
  length: int
  pad_id: int
  report: packing.FitReport

  def __len__(self) -> int:
    return len(self.examples)


def load(
  name: str,
  *,
  seed: int = 0,
  data_dir: str | pathlib.Path = "data",
  manual_folder: str | pathlib.Path | None = None,
  tasks: Sequence[str] | None = None,
  train_rows: int | None = None,
) -> records.TextData:
  """Loads a data set.

  Args:
    name: one of `names()`, or the path of a `.jsonl` file or of a folder of them.
    seed: data seed; draws the training rows and the wordings of the instructions. The test examples
      are the same for every seed.
    data_dir: folder of prepared data sets.
    manual_folder: folder with the published files of `instruction_induction` or `gsm8k`; None to
      download them.
    tasks: tasks to use; None for all. Only for data sets of several tasks.
    train_rows: maximum number of training rows per task; None for all.

  Raises:
    UserError: an unknown name or task (the message lists the known ones), a missing or malformed
      file, or an argument that the data set does not take.
  """
  arguments = {"tasks": tasks, "manual_folder": manual_folder}
  data_set = _DATA_SETS.get(name)
  takes = data_set.takes if data_set else ()
  for argument, value in arguments.items():
    if value is not None and argument not in takes:
      raise errors.UserError(f"data.{argument} has no meaning for {name!r}; leave it out")
  if data_set:
    arguments["data_dir"] = data_dir
    return data_set.load(
      seed=seed, train_rows=train_rows, **{argument: arguments[argument] for argument in takes}
    )
  if pathlib.Path(name).exists() or str(name).endswith(".jsonl"):
    return jsonl.load(name, seed=seed, train_rows=train_rows)
  raise errors.UserError(
    f"unknown data set {name!r}; known: {', '.join(names())}, or the path of a .jsonl file"
  )


def encode(
  examples: Sequence[records.Example],
  tokenizer: formatting.Tokenizer,
  render: formatting.Render,
  *,
  length: int,
  instruction_in_prompt: bool,
  on_long: str = "drop",
) -> EncodedSplit:
  """Tokenises a split and fits it to rows of `length` places.

  Raises:
    UserError: see `formatting.encode_example` and `packing.fit`.
  """
  encoded = [
    formatting.encode_example(
      example, tokenizer, render, instruction_in_prompt=instruction_in_prompt
    )
    for example in examples
  ]
  fitting, report = packing.fit(encoded, length, on_long)
  pad_id = 0 if tokenizer.pad_id is None else tokenizer.pad_id
  return EncodedSplit(tuple(fitting), length, pad_id, report)


def batches(
  split: EncodedSplit,
  *,
  batch_size: int,
  seed: int,
  pack: bool = True,
  window: int = 256,
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.IterDataset:
  """An endless stream of training batches.

  Every epoch is a new permutation. A batch may contain the end of one epoch and the start of the
  next. The iterator's state is a small dictionary of integers, and restoring it takes the same time
  at every step.

  Args:
    split: the tokenised split.
    batch_size: rows of the global batch, over all processes.
    seed: seed of the order.
    pack: True packs several examples into a row; False gives one padded example per row.
    window: see `packing.plan`.
    shard_index, shard_count: index of this process, and number of processes.

  Returns:
    A Grain data set of `TextBatch` with B = batch_size / shard_count.

  Raises:
    UserError: a size or a seed out of range, or a batch that the processes cannot share evenly.
  """
  for field, value, minimum in (
    ("batch_size", batch_size, 1),
    ("seed", seed, 0),
    ("window", window, 1),
    ("shard_count", shard_count, 1),
    ("shard_index", shard_index, 0),
  ):
    if value < minimum:
      raise errors.UserError(f"{field} is {value}; it must be at least {minimum}")
  if shard_index >= shard_count:
    raise errors.UserError(f"shard_index is {shard_index}; it must be below {shard_count}")
  if batch_size % shard_count:
    raise errors.UserError(f"batch_size is {batch_size}; it must be a multiple of {shard_count}")
  return _Batches(split, batch_size, seed, window if pack else 1, shard_index, shard_count)


def packing_efficiency(
  split: EncodedSplit, *, seed: int, pack: bool = True, window: int = 256
) -> float:
  """Fraction of places, over the rows of the first epoch, that are not padding."""
  lengths = _lengths(split)
  rows = _epoch_rows(lengths, split.length, seed, 0, window if pack else 1)
  return packing.efficiency(lengths, rows, split.length)


def evaluation_batches(
  split: EncodedSplit, *, batch_size: int, shard_index: int = 0, shard_count: int = 1
) -> Iterator[tuple[TextBatch, np.ndarray]]:
  """Every example once, in order, one per row.

  All processes get the same number of batches of `batch_size / shard_count` rows. Missing rows are
  filled with padding.

  Yields:
    The batch, and int32 [B]: the example's position in `split.examples`, or -1 for padding.
  """
  if batch_size < 1 or batch_size % shard_count:
    raise errors.UserError(f"batch_size is {batch_size}; it must be a multiple of {shard_count}")
  local = batch_size // shard_count
  for start in range(0, len(split), batch_size):
    index = start + shard_index * local + np.arange(local)
    index = np.where(index < len(split), index, -1).astype(np.int32)
    rows = [() if i < 0 else (split.examples[i],) for i in index]
    yield packing.build(rows, split.length, split.pad_id), index


def packed_evaluation_batches(
  split: EncodedSplit, *, batch_size: int, window: int = 256
) -> Iterator[TextBatch]:
  """Every example once, several per row: for sums over the tokens of all examples.

  The last batch is completed with rows of padding.
  """
  if batch_size < 1:
    raise errors.UserError(f"batch_size is {batch_size}; it must be at least 1")
  rows = packing.plan(_lengths(split), split.length, window)
  rows += [()] * (-len(rows) % batch_size)
  for start in range(0, len(rows), batch_size):
    batch_examples = [[split.examples[i] for i in row] for row in rows[start : start + batch_size]]
    yield packing.build(batch_examples, split.length, split.pad_id)


class _Batches(grain.IterDataset):
  """See `batches`."""

  def __init__(self, split, batch_size, seed, window, shard_index, shard_count):
    super().__init__()
    self.split, self.seed, self.window = split, seed, window
    self.batch_size = batch_size
    local = batch_size // shard_count
    self.process_rows = slice(shard_index * local, (shard_index + 1) * local)
    self.lengths = _lengths(split)
    self.answers = np.array([example.answer_mask[1:].sum() for example in split.examples], np.int32)
    setting = f"{split.length}/{batch_size}/{seed}/{window}".encode()
    self.fingerprint = zlib.crc32(setting + self.lengths.tobytes())

  def __iter__(self) -> grain.DatasetIterator:
    return _BatchIterator(self)


class _BatchIterator(grain.DatasetIterator):
  """Holds the epoch and the row with which the next global batch starts."""

  def __init__(self, data: _Batches):
    super().__init__()
    self._data = data
    self._step = self._epoch = self._row = 0
    self._rows: list[tuple[int, ...]] | None = None

  def __next__(self) -> TextBatch:
    batch_rows: list[tuple[int, ...]] = []
    while len(batch_rows) < self._data.batch_size:
      rows = self._epoch_rows()
      next_rows = rows[self._row : self._row + self._data.batch_size - len(batch_rows)]
      batch_rows += next_rows
      self._row += len(next_rows)
      if self._row == len(rows):
        self._epoch, self._row, self._rows = self._epoch + 1, 0, None
    self._step += 1
    split = self._data.split
    process_examples = [
      [split.examples[i] for i in row] for row in batch_rows[self._data.process_rows]
    ]
    answers = np.array([self._data.answers[list(row)].sum() for row in batch_rows], np.int32)
    return packing.build(process_examples, split.length, split.pad_id)._replace(row_answers=answers)

  def get_state(self) -> dict[str, int]:
    return {
      "step": self._step,
      "epoch": self._epoch,
      "row": self._row,
      "fingerprint": self._data.fingerprint,
    }

  def set_state(self, state: dict[str, int]) -> None:
    """Continues after the step at which the state was taken.

    Raises:
      UserError: the state has other data, seed, length, batch size or packing.
    """
    if state["fingerprint"] != self._data.fingerprint:
      raise errors.UserError(
        "the data iterator's checkpoint belongs to other data or to another seed, length, "
        "batch_size or packing window; restore with the settings of the saved run"
      )
    self._step, self._epoch, self._row = (int(state[key]) for key in ("step", "epoch", "row"))
    self._rows = None

  def _epoch_rows(self) -> list[tuple[int, ...]]:
    if self._rows is None:
      data = self._data
      self._rows = _epoch_rows(data.lengths, data.split.length, data.seed, self._epoch, data.window)
    return self._rows


def _lengths(split: EncodedSplit) -> np.ndarray:
  return np.array([packing.num_places(example) for example in split.examples], np.int64)


def _epoch_rows(
  lengths: np.ndarray, row_length: int, seed: int, epoch: int, window: int
) -> list[tuple[int, ...]]:
  """Rows of one epoch, as positions of examples, in the order of Grain's shuffle."""
  shuffled = order.batch_order(len(lengths), len(lengths), 1, seed, start_step=epoch)[0]
  rows = packing.plan(lengths[shuffled], row_length, window)
  return [tuple(int(shuffled[i]) for i in row) for row in rows]
