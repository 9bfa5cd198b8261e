"""The order of examples equals Grain's, and any step can be computed alone."""

import time

import grain
import hypothesis
import numpy as np
import pytest
from grain import experimental
from hypothesis import strategies as st

from qlora_jax import errors
from qlora_jax.data import order


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
  num_examples=st.integers(300, 1500),  # Grain takes milliseconds per index for a smaller n
  batch_size=st.integers(1, 20),
  num_steps=st.integers(0, 8),
  seed=st.integers(0, 2**32 - 1),
  start_step=st.integers(0, 500),
)
def test_batch_order_equals_grain_iteration(num_examples, batch_size, num_steps, seed, start_step):
  dataset = grain.MapDataset.range(num_examples).seed(seed).shuffle().repeat().batch(batch_size)
  expected = [dataset[start_step + step] for step in range(num_steps)]
  actual = order.batch_order(num_examples, batch_size, num_steps, seed, start_step)
  assert actual.dtype == np.int32 and actual.shape == (num_steps, batch_size)
  np.testing.assert_array_equal(actual, np.reshape(expected, (num_steps, batch_size)))


@pytest.mark.parametrize("num_examples", [255, 8192, 65536, 65537, 65538, 300_000])
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_epoch_order_equals_grain_index_shuffle_at_every_block_size(num_examples, seed):
  permutation = order.epoch_order(num_examples, seed)
  for index in np.random.default_rng(0).integers(num_examples, size=20).tolist():
    expected = experimental.index_shuffle(index, num_examples - 1, seed, 4)
    assert permutation[index] == expected


@pytest.mark.parametrize("num_examples", [1, 2, 3, 17])
def test_tiny_splits_follow_grain_too(num_examples):
  dataset = grain.MapDataset.range(num_examples).seed(4).shuffle().repeat().batch(3)
  expected = [dataset[step] for step in range(4)]
  np.testing.assert_array_equal(order.batch_order(num_examples, 3, 4, seed=4), expected)


def test_every_epoch_is_a_new_permutation():
  epochs = order.batch_order(100, 10, 30, seed=3).reshape(3, 100)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(100))
  assert not np.array_equal(epochs[0], epochs[1])


def test_a_resumed_run_continues_the_same_order():
  whole = order.batch_order(77, 16, 50, seed=5)
  for start in (0, 1, 17, 49):
    np.testing.assert_array_equal(
      order.batch_order(77, 16, 50 - start, seed=5, start_step=start), whole[start:]
    )


def test_different_seeds_give_different_orders():
  first, second = (order.batch_order(1000, 50, 40, seed=seed) for seed in (0, 1))
  assert (first == second).mean() < 0.02


def test_a_sweeps_orders_take_seconds():
  start = time.perf_counter()
  for seed in range(10):
    order.batch_order(8192, 64, 1500, seed)
  assert time.perf_counter() - start < 6  # about 0.7 s on two cores, 20 s through Grain


def test_sizes_below_one_are_refused():
  with pytest.raises(errors.UserError, match="batch_size is 0"):
    order.batch_order(10, 0, 1, seed=0)
  with pytest.raises(errors.UserError, match="start_step is -1"):
    order.batch_order(10, 1, 1, seed=0, start_step=-1)
