"""Packing: every example once and whole, no row too long, no target across examples."""

import numpy as np
import pytest

from qlora_jax import errors
from qlora_jax.data.text import formatting, packing


def _encoded(prompt, answer, first=10, instruction=0, source="train.jsonl line 7"):
  tokens = np.arange(first, first + prompt + answer, dtype=np.int32)
  mask = np.arange(prompt + answer) >= prompt
  return formatting.Encoded(tokens, mask, prompt, instruction, source)


@pytest.mark.parametrize("window", [1, 7, 64, 1000])
def test_plan_uses_every_example_once_and_no_row_overflows(window):
  lengths = np.random.default_rng(0).integers(1, 65, 300)
  rows = packing.plan(lengths, 64, window)
  assert sorted(i for row in rows for i in row) == list(range(300))
  assert all(lengths[list(row)].sum() <= 64 for row in rows)
  for row in rows:  # a row has examples of one window only
    assert len({i // window for i in row}) == 1
  if window == 1:
    assert rows == [(i,) for i in range(300)]
  elif window >= 64:
    assert packing.efficiency(lengths, rows, 64) > 0.9
    # First-fit-decreasing needs at most 11/9 of the fewest possible rows, plus one per window.
    fewest = -(-lengths.sum() // 64)
    assert len(rows) <= 11 / 9 * fewest + 1 + 300 // window


def test_first_fit_decreasing_by_hand():
  # window one: 6, 5, 4, 3 of 10 -> (6, 4), (5, 3); window two: 9, 1 -> (9, 1)
  rows = packing.plan(np.array([3, 6, 5, 4, 1, 9]), 10, window=4)
  assert rows == [(0, 2), (1, 3), (4, 5)]
  assert packing.efficiency(np.array([3, 6, 5, 4, 1, 9]), rows, 10) == pytest.approx(28 / 30)


def test_build_restarts_positions_and_shifts_targets_within_each_example():
  batch = packing.build([[_encoded(2, 2, 10, 3), _encoded(1, 2, 20, 5)], []], length=7, pad_id=9)
  for name, dtype in zip(packing.TextBatch._fields[:6], "iifiii", strict=True):
    array = getattr(batch, name)
    assert array.shape == (2, 7) and array.dtype == {"i": np.int32, "f": np.float32}[dtype]
  np.testing.assert_array_equal(batch.tokens[0], [10, 11, 12, 20, 21, 9, 9])
  np.testing.assert_array_equal(batch.targets[0], [11, 12, 13, 21, 22, 9, 9])
  np.testing.assert_array_equal(batch.loss_mask[0], [0, 1, 1, 1, 1, 0, 0])
  np.testing.assert_array_equal(batch.segment_ids[0], [1, 1, 1, 2, 2, 0, 0])
  np.testing.assert_array_equal(batch.positions[0], [0, 1, 2, 0, 1, 0, 0])
  np.testing.assert_array_equal(batch.instruction_id[0], [3, 3, 3, 5, 5, 0, 0])
  assert not batch.loss_mask[1].any() and not batch.segment_ids[1].any()
  with pytest.raises(ValueError, match="row 0"):
    packing.build([[_encoded(5, 5)]], length=8)


def test_an_example_of_exactly_the_row_fits():
  kept, report = packing.fit([_encoded(4, 5)], 8, "error")
  assert len(kept) == 1 and report.truncated == 0


def test_fit_counts_what_it_drops_and_truncates():
  examples = [_encoded(2, 2), _encoded(3, 9), _encoded(12, 2), _encoded(4, 0)]
  kept, report = packing.fit(examples, 8, "drop")
  assert kept == examples[:1]
  assert report == packing.FitReport(4, 1, 0, 0, dropped_long=2, dropped_no_answer=1)
  kept, report = packing.fit(examples, 8, "truncate")
  assert report == packing.FitReport(4, 2, 1, 3, dropped_long=1, dropped_no_answer=1)
  assert packing.num_places(kept[1]) == 8 and kept[1].answer_mask.sum() == 6
  assert "1 truncated by 3 tokens" in str(report) and "1 too long" in str(report)


def test_mistakes_name_the_example():
  with pytest.raises(errors.UserError, match=r"train.jsonl line 7: takes 11 places.*has 8"):
    packing.fit([_encoded(3, 9)], 8, "error")
  with pytest.raises(errors.UserError, match=r"train.jsonl line 7: has no answer token"):
    packing.fit([_encoded(3, 0)], 8, "error")
  with pytest.raises(
    errors.UserError, match=r"no example is left for rows of length 8.*2 too long"
  ):
    packing.fit([_encoded(3, 9), _encoded(30, 1)], 8, "drop")
  with pytest.raises(errors.UserError, match=r"on_long is 'skip'; known: error, truncate, drop"):
    packing.fit([], 8, "skip")
  with pytest.raises(errors.UserError, match="length is 0"):
    packing.fit([], 0)
  with pytest.raises(errors.UserError, match="window is 0"):
    packing.plan(np.array([1]), 8, 0)
