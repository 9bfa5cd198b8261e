"""Rows of fixed length: which examples fit, which share a row, and the arrays they become.

An example of n tokens takes n - 1 places: place t holds token t and has token t + 1 as its target,
so no target ever crosses from one example into the next. Within a row every example is a segment
with a number of its own (from 1; 0 is padding) and positions that restart at 0; attention must be
restricted to equal segment numbers.

Packing is first-fit-decreasing (Johnson 1973) over windows of consecutive examples of the shuffled
order, so that training stays random while rows fill up.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax import errors
from qlora_jax.data.text import formatting

ON_LONG = ("error", "truncate", "drop")


class TextBatch(NamedTuple):
  """B rows of T places.

  Attributes:
    tokens: int32 [B, T].
    targets: int32 [B, T], the next token; `pad_id` where there is none.
    loss_mask: float32 [B, T], 1 where the target is an answer's token.
    segment_ids: int32 [B, T], from 1 in each row; 0 on padding.
    positions: int32 [B, T], from 0 in each segment; 0 on padding.
    instruction_id: int32 [B, T], row of `TextData.instruction_texts`; 0 on padding.
    row_answers: int32, ones of `loss_mask` in each row of the batch of all processes together, in
      their order; None where the batch is one process's alone.
  """

  tokens: np.ndarray
  targets: np.ndarray
  loss_mask: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray
  instruction_id: np.ndarray
  row_answers: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class FitReport:
  """What became of the examples of a split.

  Attributes:
    examples: how many there were.
    kept: how many are used, truncated ones included.
    truncated, truncated_tokens: how many lost the end of an answer, and how many tokens in all.
    dropped_long: dropped for being longer than the row (with 'truncate': for a prompt that leaves
      no room for an answer).
    dropped_no_answer: dropped for having no answer token.
  """

  examples: int
  kept: int
  truncated: int
  truncated_tokens: int
  dropped_long: int
  dropped_no_answer: int

  def __str__(self) -> str:
    return (
      f"{self.kept} of {self.examples} examples kept; {self.truncated} truncated by "
      f"{self.truncated_tokens} tokens; dropped: {self.dropped_long} too long, "
      f"{self.dropped_no_answer} without an answer"
    )


def num_places(encoded: formatting.Encoded) -> int:
  """Places that an example takes in a row."""
  return len(encoded.tokens) - 1


def fit(
  encoded: Sequence[formatting.Encoded], length: int, on_long: str = "drop"
) -> tuple[list[formatting.Encoded], FitReport]:
  """Makes every example fit a row of `length` places.

  Args:
    encoded: tokenised examples.
    length: T.
    on_long: 'drop' leaves out what is too long or has no answer, and counts it; 'truncate' cuts
      the end of the answer, and drops what has no answer token left; 'error' raises.

  Returns:
    The examples kept, in their order, and what became of the others.

  Raises:
    UserError: an unknown `on_long`, a length below one, nothing left, or under 'error' the first
      example that does not fit, with its source.
  """
  if on_long not in ON_LONG:
    raise errors.UserError(f"on_long is {on_long!r}; known: {', '.join(ON_LONG)}")
  if length < 1:
    raise errors.UserError(f"length is {length}; it must be at least 1")
  kept, truncated, truncated_tokens, long, no_answer = [], 0, 0, 0, 0
  for one in encoded:
    excess = num_places(one) - length
    if not one.answer_mask.any():
      no_answer += 1
      if on_long == "error":
        raise errors.UserError(f"{one.source}: has no answer token")
    elif excess <= 0:
      kept.append(one)
    elif on_long == "error":
      raise errors.UserError(
        f"{one.source}: takes {num_places(one)} places, the row has {length}; raise the length "
        "or set on_long to truncate or drop"
      )
    elif on_long == "truncate" and one.answer_mask[: length + 1].any():
      truncated, truncated_tokens = truncated + 1, truncated_tokens + excess
      kept.append(
        dataclasses.replace(
          one,
          tokens=one.tokens[: length + 1],
          answer_mask=one.answer_mask[: length + 1],
          prompt_length=min(one.prompt_length, length + 1),
        )
      )
    else:
      long += 1
  report = FitReport(len(encoded), len(kept), truncated, truncated_tokens, long, no_answer)
  if not kept:
    raise errors.UserError(f"no example is left for rows of length {length}: {report}")
  return kept, report


def plan(lengths: np.ndarray, row_length: int, window: int = 256) -> list[tuple[int, ...]]:
  """Says which examples share a row.

  Args:
    lengths: int [n], places of each example in the order they are to be used; none above
      `row_length`.
    row_length: T.
    window: examples that are packed together; 1 gives one example a row.

  Returns:
    Positions in `lengths` for every row; rows come in the order of their first example.

  Raises:
    UserError: a window below one.
  """
  if window < 1:
    raise errors.UserError(f"window is {window}; it must be at least 1")
  rows: list[tuple[int, ...]] = []
  for start in range(0, len(lengths), window):
    inside = lengths[start : start + window]
    free = np.full(len(inside), row_length)
    members: list[list[int]] = [[] for _ in inside]
    for i in np.argsort(-inside, kind="stable"):
      row = int(np.argmax(free >= inside[i]))  # the first row with room
      free[row] -= inside[i]
      members[row].append(start + int(i))
    rows += sorted(tuple(sorted(row)) for row in members if row)
  return rows


def efficiency(lengths: np.ndarray, rows: Sequence[Sequence[int]], row_length: int) -> float:
  """Share of the places of all rows that are not padding."""
  return float(np.sum(lengths)) / (len(rows) * row_length)


def build(rows: Sequence[Sequence[formatting.Encoded]], length: int, pad_id: int = 0) -> TextBatch:
  """Lays examples out in B rows of `length` places; a row without examples is all padding."""
  shape = (len(rows), length)
  batch = TextBatch(
    tokens=np.full(shape, pad_id, np.int32),
    targets=np.full(shape, pad_id, np.int32),
    loss_mask=np.zeros(shape, np.float32),
    segment_ids=np.zeros(shape, np.int32),
    positions=np.zeros(shape, np.int32),
    instruction_id=np.zeros(shape, np.int32),
  )
  for b, row in enumerate(rows):
    start = 0
    for segment, one in enumerate(row, start=1):
      end = start + num_places(one)
      if end > length:
        raise ValueError(f"row {b} holds more than {length} places")
      batch.tokens[b, start:end] = one.tokens[:-1]
      batch.targets[b, start:end] = one.tokens[1:]
      batch.loss_mask[b, start:end] = one.answer_mask[1:]
      batch.segment_ids[b, start:end] = segment
      batch.positions[b, start:end] = np.arange(end - start)
      batch.instruction_id[b, start:end] = one.instruction_id
      start = end
  return batch
