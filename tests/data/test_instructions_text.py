"""The texts: twelve distinct ones per target, and disjoint seen and held-out ids."""

import numpy as np
import pytest

from qlora_jax.data import instructions_text, pipeline


@pytest.mark.parametrize("name", pipeline.task_names())
def test_every_target_and_source_has_twelve_texts_and_none_repeats(name):
  task = pipeline.describe_task(name)
  assert len(task.paraphrases) == 12 * len(task.target_names + task.source_names)
  assert len({text.lower() for text in task.paraphrases}) == len(task.paraphrases)
  for text in task.paraphrases:
    assert text[0].isupper() and text[-1] in ".?" and "{" not in text and len(text) < 160


@pytest.mark.parametrize("name", pipeline.task_names())
def test_seen_and_heldout_ids_partition_the_texts(name):
  task = pipeline.describe_task(name)
  ids = np.concatenate([task.seen_paraphrases.ravel(), task.heldout_paraphrases.ravel()])
  np.testing.assert_array_equal(np.sort(ids), np.arange(len(task.paraphrases)))
  assert task.seen_paraphrases.shape[1] == 8 and task.heldout_paraphrases.shape[1] == 4


def test_multi_target_texts_name_the_right_feature():
  ordinals = {
    "first_feature_trend_up": {"first", "one", "1"},
    "fourth_feature_trend_down": {"fourth", "four", "4"},
    "third_feature_wave": {"third", "three", "3"},
    "fifth_feature_step": {"fifth", "five", "5"},
    "second_feature_bowl": {"second", "two", "2"},
  }
  all_words = set().union(*ordinals.values())
  for target, target_words in ordinals.items():
    for text in instructions_text.target_paraphrases(target):
      words = set(text.lower().replace(".", " ").replace(",", " ").split())
      # "feature one", "input two": words such as "two-cycle" and "one half" name no feature
      named = words & all_words
      assert named & target_words, text
      assert not (named - target_words) & {"first", "third", "fourth", "fifth"}, text


def test_draws_stay_within_the_texts_of_their_target():
  target_id = np.repeat(np.arange(3), 1000)
  for heldout, expected in ((False, range(8)), (True, range(8, 12))):
    rng = np.random.default_rng(0)
    ids = instructions_text.draw_paraphrases(target_id, rng, heldout=heldout)
    np.testing.assert_array_equal(ids // 12, target_id)
    assert set(ids % 12) == set(expected)
