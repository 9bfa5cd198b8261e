"""Synthetic rows: pure functions of (task, seed), stored and read back unchanged."""

import numpy as np
import pytest

from qlora_jax import errors
from qlora_jax.data import functions, noise, storage, synthetic_regression


@pytest.mark.parametrize("task", functions.TASKS)
def test_clean_target_is_the_function_of_the_stored_input(task):
  spec = functions.TASKS[task]
  rows = synthetic_regression.draw_rows(task, "train", seed=2)
  expected = functions.target_values(spec, rows["features"].astype(float), rows["target_id"])
  np.testing.assert_array_equal(rows["clean"], expected.astype(np.float32))
  assert rows["features"].min() >= 0 and rows["features"].max() < 1
  source = synthetic_regression.draw_rows(task, "source_train")
  expected = spec.source(source["features"].astype(float)).astype(np.float32)
  np.testing.assert_array_equal(source["clean"], expected)


def test_rows_are_deterministic_and_seeds_and_splits_are_disjoint():
  draws = [
    synthetic_regression.draw_rows("regimes", split, seed)["features"]
    for split, seed in (
      ("train", 0),
      ("train", 1),
      ("validation", 0),
      ("test", None),
      ("source_train", None),
      ("source_validation", None),
    )
  ]
  again = synthetic_regression.draw_rows("regimes", "train", 0)["features"]
  np.testing.assert_array_equal(draws[0], again)
  rows = np.concatenate(draws)
  assert len(np.unique(rows, axis=0)) == len(rows)


def test_tasks_with_one_source_share_its_rows():
  rows = [
    synthetic_regression.draw_rows(task, "source_train")
    for task in ("friedman1", "regimes", "multi_target")
  ]
  for other in rows[1:]:
    for column in ("features", "clean", "noise"):
      np.testing.assert_array_equal(other[column], rows[0][column])


def test_six_targets_are_balanced():
  counts = np.bincount(synthetic_regression.draw_rows("multi_target", "train", 0)["target_id"])
  assert len(counts) == 6 and counts.max() - counts.min() <= 1


def test_stored_rows_come_back_in_order_and_bit_for_bit(data_dir):
  config = synthetic_regression.config("sines", seed=12)
  assert config.name == "sines-seed012"
  builder = synthetic_regression.SyntheticRegression
  for _ in range(2):  # prepared, then reused
    stored = storage.read(builder, config, data_dir, ("train", "validation"))
    for split, columns in stored.items():
      expected = synthetic_regression.draw_rows("sines", split, 12)
      assert columns.keys() == expected.keys()
      for name, column in expected.items():
        assert columns[name].dtype == column.dtype
        np.testing.assert_array_equal(columns[name], column)


def test_noise_columns_follow_the_kinds():
  rows = synthetic_regression.draw_rows("friedman2", "train", 0)
  assert rows["noise"].shape == (8192, len(noise.KINDS)) and rows["noise"].dtype == np.float32


def test_configuration_names_are_parsed_back():
  assert synthetic_regression.parse_config("regimes") == ("regimes", None)
  assert synthetic_regression.parse_config("multi_target-seed003") == ("multi_target", 3)
  with pytest.raises(errors.UserError, match="data seed is -1"):
    synthetic_regression.config("regimes", -1)
