"""Truncation to a row: keeps the tokens that fit, and shortens the prompt length."""

import numpy as np
import pytest

from qlora_jax.data.text import formatting, packing


@pytest.mark.parametrize("length", [4, 5, 9, 10])
def test_a_truncated_example_fills_the_row_and_loses_the_end_alone(length):
  tokens = np.arange(100, 112, dtype=np.int32)
  example = formatting.Encoded(tokens, np.arange(12) >= 3, 3, 7, "source")
  (fitted,), report = packing.fit([example], length, "truncate")
  # A row of T places takes T + 1 tokens: the last token is only a target.
  np.testing.assert_array_equal(fitted.tokens, tokens[: length + 1])
  np.testing.assert_array_equal(fitted.answer_mask, np.arange(length + 1) >= 3)
  assert packing.num_places(fitted) == length
  assert (report.truncated, report.truncated_tokens) == (1, 11 - length)
  assert (fitted.prompt_length, fitted.instruction_id, fitted.source) == (3, 7, "source")
  batch = packing.build([[fitted]], length)
  np.testing.assert_array_equal(batch.tokens[0], tokens[:length])
  np.testing.assert_array_equal(batch.targets[0], tokens[1 : length + 1])
  assert batch.loss_mask.sum() == length + 1 - 3 and (batch.segment_ids == 1).all()


def test_the_prompt_of_a_truncated_conversation_ends_inside_its_tokens():
  # Two answers, tokens 2..4 and 9..11: the last prompt is longer than the truncated example.
  mask = np.zeros(12, bool)
  mask[2:5] = mask[9:12] = True
  example = formatting.Encoded(np.arange(12, dtype=np.int32), mask, 9, 0, "source")
  for length, prompt in ((5, 6), (7, 8), (8, 9), (9, 9), (11, 9)):
    (fitted,), _ = packing.fit([example], length, "truncate")
    assert fitted.prompt_length == prompt == len(fitted.prompt)
