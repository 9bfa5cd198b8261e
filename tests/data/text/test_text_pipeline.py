"""Batches: deterministic, resumable at any step, independent of the number of processes."""

import collections
import json

import grain
import numpy as np
import pytest

from qlora_jax import errors
from qlora_jax.data import order
from qlora_jax.data.text import packing, pipeline


@pytest.fixture(scope="module")
def split(tokenizer, render):
  examples = pipeline.load("word_tasks", tasks=["plural", "sum", "sort_words"]).splits["train"]
  return pipeline.encode(
    examples[:151], tokenizer, render, length=96, instruction_in_prompt=True, on_long="error"
  )


def _take(dataset, number):
  iterator = iter(dataset)
  return [next(iterator) for _ in range(number)]


def _equal(first, second):
  for name, a, b in zip(packing.TextBatch._fields[:6], first, second, strict=False):
    np.testing.assert_array_equal(a, b, err_msg=name)


def _segments(batches):
  """Examples as tuples of tokens and last target, in order of appearance."""
  segments = []
  for batch in batches:
    for row in range(len(batch.tokens)):
      for segment in range(1, batch.segment_ids[row].max() + 1):
        in_segment = batch.segment_ids[row] == segment
        segments.append(
          (*batch.tokens[row, in_segment].tolist(), int(batch.targets[row, in_segment][-1]))
        )
  return segments


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_holds_every_example_once_and_the_next_is_another_order(split, pack):
  rows = 151 if not pack else None
  iterator = iter(pipeline.batches(split, batch_size=1, seed=1, pack=pack))
  epochs = {0: [], 1: []}
  while (epoch := iterator.get_state()["epoch"]) < 2:
    epochs[epoch].append(next(iterator))
  expected = collections.Counter(tuple(example.tokens.tolist()) for example in split.examples)
  segments = [_segments(batches) for batches in epochs.values()]
  assert collections.Counter(segments[0]) == collections.Counter(segments[1]) == expected
  assert segments[0] != segments[1]
  if rows:
    assert len(epochs[0]) == rows
  else:
    assert len(epochs[0]) < 100
    used_places = sum(int((batch.segment_ids > 0).sum()) for batch in epochs[0])
    share = used_places / (len(epochs[0]) * 96)
    assert pipeline.packing_efficiency(split, seed=1) == pytest.approx(share)
    assert share > 0.85 > 0.6 > pipeline.packing_efficiency(split, seed=1, pack=False)


def test_padded_order_is_the_project_order(split):
  indices = order.batch_order(len(split), 8, 30, seed=5)  # crosses into the next epoch
  for batch, index in zip(
    _take(pipeline.batches(split, batch_size=8, seed=5, pack=False), 30), indices, strict=True
  ):
    expected = packing.build([[split.examples[i]] for i in index], 96, split.pad_id)
    _equal(batch, expected)


@pytest.mark.parametrize("pack", [True, False])
def test_restoring_at_any_step_continues_identically(split, pack):
  dataset = pipeline.batches(split, batch_size=6, seed=2, pack=pack, window=32)
  iterator, states, seen = iter(dataset), [], []
  for _ in range(40):  # at least into the second epoch
    states.append(json.loads(json.dumps(iterator.get_state())))
    seen.append(next(iterator))
  assert iterator.get_state()["epoch"] >= 1
  resumed = iter(pipeline.batches(split, batch_size=6, seed=2, pack=pack, window=32))
  for start in (0, 1, 13, 29, 39, 7):  # backwards too
    resumed.set_state(states[start])
    for batch in seen[start : start + 3]:
      _equal(next(resumed), batch)


def test_state_survives_grains_prefetching_thread(split):
  dataset = pipeline.batches(split, batch_size=4, seed=2)
  plain = _take(dataset, 8)
  threaded = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=2)
  iterator = iter(threaded)
  for batch in plain[:5]:
    _equal(next(iterator), batch)
  state = iterator.get_state()
  again = iter(threaded)
  again.set_state(state)
  for batch in plain[5:]:
    _equal(next(again), batch)


@pytest.mark.parametrize("pack", [True, False])
def test_parts_of_all_processes_are_the_batch_of_one(split, pack):
  whole = _take(pipeline.batches(split, batch_size=12, seed=7, pack=pack), 20)
  parts = [
    _take(
      pipeline.batches(split, batch_size=12, seed=7, pack=pack, shard_index=index, shard_count=3),
      20,
    )
    for index in range(3)
  ]
  for step, batch in enumerate(whole):
    shares = [p[step][:6] for p in parts]
    joined = [np.concatenate(arrays) for arrays in zip(*shares, strict=True)]
    _equal(packing.TextBatch(*joined), batch)
    for part in (batch, *(p[step] for p in parts)):  # every process has the global batch's counts
      np.testing.assert_array_equal(part.row_answers, batch.loss_mask.sum(axis=1))


def test_seed_decides_the_order(split):
  first, again, other = (
    _take(pipeline.batches(split, batch_size=8, seed=seed), 3) for seed in (1, 1, 2)
  )
  for a, b in zip(first, again, strict=True):
    _equal(a, b)
  assert not np.array_equal(first[0].tokens, other[0].tokens)


def test_state_of_other_settings_is_refused(split):
  state = iter(pipeline.batches(split, batch_size=8, seed=1)).get_state()
  for change in ({"seed": 2}, {"batch_size": 4}, {"pack": False}):
    settings = {"batch_size": 8, "seed": 1} | change
    with pytest.raises(errors.UserError, match="belongs to other data"):
      iter(pipeline.batches(split, **settings)).set_state(state)


def test_instruction_id_of_every_token_names_its_examples_text(split):
  data = pipeline.load("word_tasks", tasks=["plural", "sum", "sort_words"])
  by_tokens = {tuple(example.tokens.tolist()): example.instruction_id for example in split.examples}
  for batch in _take(pipeline.batches(split, batch_size=4, seed=0), 5):
    assert 0 <= batch.instruction_id.min() <= batch.instruction_id.max() < 27
    for row in range(4):
      for segment in range(1, batch.segment_ids[row].max() + 1):
        at = batch.segment_ids[row] == segment
        key = (*batch.tokens[row, at].tolist(), int(batch.targets[row, at][-1]))
        assert set(batch.instruction_id[row, at]) == {by_tokens[key]}
  assert len(data.instruction_texts) == 27


@pytest.mark.parametrize("shard_count", [1, 2])
def test_evaluation_sees_every_example_once_in_order(split, shard_count):
  seen, sizes = [], []
  for shard in range(shard_count):
    for batch, index in pipeline.evaluation_batches(
      split, batch_size=16, shard_index=shard, shard_count=shard_count
    ):
      sizes.append(batch.tokens.shape)
      assert index.dtype == np.int32 and ((batch.segment_ids.max(axis=1) == 0) == (index < 0)).all()
      seen += index[index >= 0].tolist()
      expected = packing.build([[split.examples[i]] if i >= 0 else [] for i in index], 96, 0)
      _equal(batch, expected)
  assert sorted(seen) == list(range(151)) and set(sizes) == {(16 // shard_count, 96)}
  assert len(sizes) == shard_count * 10


def test_long_examples_are_counted_or_named(tokenizer, render):
  examples = pipeline.load("word_tasks", tasks=["sort_words"]).splits["train"]
  settings = {"length": 40, "instruction_in_prompt": True}
  split = pipeline.encode(examples, tokenizer, render, **settings)
  assert 0 < split.report.dropped_long < 200 and len(split) + split.report.dropped_long == 200
  with pytest.raises(errors.UserError, match=r"word_tasks/train/sort_words, row \d+: takes"):
    pipeline.encode(examples, tokenizer, render, on_long="error", **settings)


def test_sizes_are_checked(split):
  for settings, message in (
    ({"batch_size": 0, "seed": 0}, "batch_size is 0"),
    ({"batch_size": 5, "seed": 0, "shard_count": 2}, "multiple of 2"),
    ({"batch_size": 4, "seed": 0, "shard_count": 2, "shard_index": 2}, "shard_index is 2"),
    ({"batch_size": 4, "seed": -1}, "seed is -1"),
    ({"batch_size": 4, "seed": 0, "window": 0}, "window is 0"),
  ):
    with pytest.raises(errors.UserError, match=message):
      pipeline.batches(split, **settings)
