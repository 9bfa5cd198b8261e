"""Packs examples into rows of fixed length: fitting, assignment to rows, and arrays.

An example of n tokens takes n - 1 places. Place t holds token t, and its target is token t + 1, so
a target is never a token of another example. Each example of a row is one segment. Segment numbers
start at 1 (0 is padding), and positions restart at 0 in each segment. Attention must be restricted
to equal segment numbers.

Packing is first-fit-decreasing (Johnson 1973) over windows of consecutive examples of the shuffled
order. The order of training stays random, and the rows contain little padding.
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
    targets: int32 [B, T], the next token; `pad_id` on padding.
    loss_mask: float32 [B, T], 1 where the target is an answer token, else 0.
    segment_ids: int32 [B, T], from 1 in each row; 0 on padding.
    positions: int32 [B, T], from 0 in each segment; 0 on padding.
    instruction_id: int32 [B, T], row of `TextData.instruction_texts`; 0 on padding.
    row_answers: int32 [global B], the sum of `loss_mask` per row of the global batch, in the order
      of the processes; None for a batch that is not part of a global batch.
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
  """Counts of used, truncated and dropped examples of a split.

  Attributes:
    examples: examples of the split.
    kept: examples that are used, including truncated ones.
    truncated: examples whose end was removed.
    truncated_tokens: tokens removed from all truncated examples together.
    dropped_long: examples dropped because they are longer than the row. With 'truncate': because
      no answer token remains within the row.
    dropped_no_answer: examples dropped because they have no answer token.
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
  """Number of places that an example takes in a row."""
  return len(encoded.tokens) - 1


def fit(
  encoded: Sequence[formatting.Encoded], length: int, on_long: str = "drop"
) -> tuple[list[formatting.Encoded], FitReport]:
  """Drops or truncates examples that do not fit a row of `length` places.

  Args:
    encoded: tokenised examples.
    length: T.
    on_long: 'drop' drops examples that are too long. 'truncate' removes the end of such an example,
      and drops it if no answer token remains. Both drop examples without an answer token. 'error'
      raises for the first example that is too long or has no answer token.

  Returns:
    The kept examples in their order, and the counts.

  Raises:
    UserError: an unknown `on_long`, a length below 1, no kept example, or with 'error' an example
      that does not fit; the message names its source.
  """
  if on_long not in ON_LONG:
    raise errors.UserError(f"on_long is {on_long!r}; known: {', '.join(ON_LONG)}")
  if length < 1:
    raise errors.UserError(f"length is {length}; it must be at least 1")
  kept, truncated, truncated_tokens, dropped_long, dropped_no_answer = [], 0, 0, 0, 0
  for example in encoded:
    excess = num_places(example) - length
    if not example.answer_mask.any():
      dropped_no_answer += 1
      if on_long == "error":
        raise errors.UserError(f"{example.source}: has no answer token")
    elif excess <= 0:
      kept.append(example)
    elif on_long == "error":
      raise errors.UserError(
        f"{example.source}: takes {num_places(example)} places, the row has {length}; raise the "
        "length or set on_long to truncate or drop"
      )
    elif on_long == "truncate" and example.answer_mask[: length + 1].any():
      truncated, truncated_tokens = truncated + 1, truncated_tokens + excess
      kept.append(
        dataclasses.replace(
          example,
          tokens=example.tokens[: length + 1],
          answer_mask=example.answer_mask[: length + 1],
          prompt_length=min(example.prompt_length, length + 1),
        )
      )
    else:
      dropped_long += 1
  report = FitReport(
    len(encoded), len(kept), truncated, truncated_tokens, dropped_long, dropped_no_answer
  )
  if not kept:
    raise errors.UserError(f"no example is left for rows of length {length}: {report}")
  return kept, report


def plan(lengths: np.ndarray, row_length: int, window: int = 256) -> list[tuple[int, ...]]:
  """Assigns examples to rows.

  Args:
    lengths: int [n], places of each example in training order; at most `row_length` each.
    row_length: T.
    window: number of consecutive examples that are packed together; 1 gives one example per row.

  Returns:
    For each row, positions in `lengths`. Rows are in the order of their first example.

  Raises:
    UserError: a window below 1.
  """
  if window < 1:
    raise errors.UserError(f"window is {window}; it must be at least 1")
  rows: list[tuple[int, ...]] = []
  for start in range(0, len(lengths), window):
    window_lengths = lengths[start : start + window]
    free_places = np.full(len(window_lengths), row_length)
    window_rows: list[list[int]] = [[] for _ in window_lengths]
    for i in np.argsort(-window_lengths, kind="stable"):
      row = int(np.argmax(free_places >= window_lengths[i]))  # the first row with room
      free_places[row] -= window_lengths[i]
      window_rows[row].append(start + int(i))
    rows += sorted(tuple(sorted(row)) for row in window_rows if row)
  return rows


def efficiency(lengths: np.ndarray, rows: Sequence[Sequence[int]], row_length: int) -> float:
  """Fraction of places, over all rows, that are not padding."""
  return float(np.sum(lengths)) / (len(rows) * row_length)


def build(rows: Sequence[Sequence[formatting.Encoded]], length: int, pad_id: int = 0) -> TextBatch:
  """Writes examples into B rows of `length` places; a row without examples is all padding."""
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
    for segment, example in enumerate(row, start=1):
      end = start + num_places(example)
      if end > length:
        raise ValueError(f"row {b} holds more than {length} places")
      batch.tokens[b, start:end] = example.tokens[:-1]
      batch.targets[b, start:end] = example.tokens[1:]
      batch.loss_mask[b, start:end] = example.answer_mask[1:]
      batch.segment_ids[b, start:end] = segment
      batch.positions[b, start:end] = np.arange(end - start)
      batch.instruction_id[b, start:end] = example.instruction_id
      start = end
  return batch
