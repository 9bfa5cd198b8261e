"""Arrays for training: standardisation by source rows, padding, pairing and refusals."""

import dataclasses

import numpy as np
import pytest

from qlora_jax import errors
from qlora_jax.data import noise, pipeline, synthetic_regression

_DIM = 24


def _target(name, data_dir, seed=0, **options):
  return pipeline.target_arrays(name, seed=seed, data_dir=data_dir, feature_dim=_DIM, **options)


@pytest.mark.parametrize("name", pipeline.task_names())
def test_arrays_have_the_declared_shapes_dtypes_and_ids(name, data_dir):
  task = pipeline.describe_task(name)
  num_targets, num_ids = len(task.target_names), len(task.target_names + task.source_names)
  source = pipeline.source_arrays(name, data_dir=data_dir, feature_dim=_DIM)
  target = _target(name, data_dir)
  assert set(source) == {"train", "validation"} and set(target) == {"train", "validation", "test"}
  for arrays, is_source, is_test in (
    *((arrays, True, False) for arrays in source.values()),
    *((arrays, False, split == "test") for split, arrays in target.items()),
  ):
    n = len(arrays)
    assert arrays.features.shape == (n, _DIM) and arrays.features.dtype == np.float32
    for values in (arrays.targets, arrays.clean):
      assert values.shape == (n,) and values.dtype == np.float32 and np.isfinite(values).all()
    assert np.isfinite(arrays.features).all()
    assert not arrays.features[:, len(task.feature_names) :].any()
    expected_ids = range(num_targets, num_ids) if is_source else range(num_targets)
    assert set(arrays.target_id) == set(expected_ids) and arrays.target_id.dtype == np.int32
    allowed = task.heldout_paraphrases if is_test else task.seen_paraphrases
    assert (arrays.paraphrase_id[:, None] == allowed[arrays.target_id]).any(axis=1).all()


@pytest.mark.parametrize("name", ["regimes", "friedman3", "bikeshare", "house_prices"])
def test_features_and_clean_targets_are_standardised_on_source_training_rows(name, data_dir):
  train = pipeline.source_arrays(name, data_dir=data_dir, feature_dim=_DIM)["train"]
  num_features = len(pipeline.describe_task(name).feature_names)
  np.testing.assert_allclose(train.clean.mean(), 0, atol=1e-4)
  np.testing.assert_allclose(train.clean.std(), 1, atol=1e-4)
  features = train.features[:, :num_features]
  unclipped = np.abs(features).max(axis=0) < pipeline.FEATURE_CLIP
  np.testing.assert_allclose(features[:, unclipped].mean(axis=0), 0, atol=1e-4)
  np.testing.assert_allclose(features[:, unclipped].std(axis=0), 1, atol=1e-4)
  assert unclipped.mean() > 0.8 and np.abs(features).max() <= pipeline.FEATURE_CLIP


def test_target_statistics_come_from_source_rows_only(data_dir):
  source = synthetic_regression.draw_rows("friedman3", "source_train")["clean"].astype(float)
  raw = synthetic_regression.draw_rows("friedman3", "train", 0)["clean"].astype(float)
  arrays = _target("friedman3", data_dir)["train"]
  np.testing.assert_allclose(
    arrays.clean, (raw - source.mean()) / source.std(), rtol=1e-4, atol=1e-5
  )
  assert abs(arrays.clean.mean()) > 0.5  # the shifted target is not itself centred


def test_statistics_of_source_training_rows_ignore_every_other_row():
  columns = {
    "features": np.array([[0.0, 5.0], [2.0, 5.0]], np.float32),
    "clean": np.array([1.0, 5.0], np.float32),
  }
  statistics = pipeline.fit_statistics(columns)
  np.testing.assert_array_equal(statistics.feature_mean, [1, 5])
  np.testing.assert_array_equal(
    statistics.feature_std, [1, 1]
  )  # a constant feature has standard deviation 1
  assert (statistics.target_mean, statistics.target_std) == (3, 2)


@pytest.mark.parametrize("kind", noise.KINDS)
def test_noise_is_paired_across_levels_and_leaves_all_else_alone(kind, data_dir):
  clean = _target("regimes", data_dir, noise_kind=kind, noise_level=0.0)
  low = _target("regimes", data_dir, noise_kind=kind, noise_level=0.5)
  high = _target("regimes", data_dir, noise_kind=kind, noise_level=1.0)
  for split in clean:
    np.testing.assert_array_equal(clean[split].targets, clean[split].clean)
    noise_low = low[split].targets - low[split].clean
    noise_high = high[split].targets - high[split].clean
    np.testing.assert_allclose(2 * noise_low, noise_high, rtol=1e-4, atol=1e-5)
    for field in ("features", "clean", "target_id", "paraphrase_id"):
      np.testing.assert_array_equal(getattr(low[split], field), getattr(high[split], field))


def test_default_noise_of_regimes_is_heavy_heteroscedastic(data_dir):
  default = _target("regimes", data_dir, noise_level=0.5)["train"].targets
  named = _target("regimes", data_dir, noise_kind="heavy_heteroscedastic", noise_level=0.5)
  np.testing.assert_array_equal(default, named["train"].targets)


def test_source_noise_has_level_one_twentieth(data_dir):
  train = pipeline.source_arrays("sines", data_dir=data_dir, feature_dim=_DIM)["train"]
  np.testing.assert_allclose((train.targets - train.clean).std(), 0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["multi_target", "avocados"])
def test_seeds_share_test_rows_and_differ_in_training_rows(name, data_dir):
  first, second = (_target(name, data_dir, seed=seed) for seed in (0, 1))
  for field in dataclasses.fields(pipeline.Arrays):
    np.testing.assert_array_equal(
      getattr(first["test"], field.name), getattr(second["test"], field.name)
    )
  assert not np.array_equal(first["train"].features, second["train"].features)


@pytest.mark.parametrize("name", ["regimes", "bikeshare"])
def test_train_rows_keeps_the_first_rows(name, data_dir):
  whole, few = _target(name, data_dir), _target(name, data_dir, train_rows=100)
  np.testing.assert_array_equal(few["train"].targets, whole["train"].targets[:100])
  assert len(few["validation"]) == len(whole["validation"])


def test_tables_have_no_clean_target_and_refuse_added_noise(data_dir):
  assert not pipeline.describe_task("bikeshare").has_clean
  arrays = _target("bikeshare", data_dir)["train"]
  np.testing.assert_array_equal(arrays.targets, arrays.clean)
  with pytest.raises(errors.UserError, match="'bikeshare' is observed"):
    _target("bikeshare", data_dir, noise_level=0.5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"noise_kind": "cauchy"}, "unknown noise_kind 'cauchy'; known: gaussian"),
    ({"noise_level": -0.1}, "noise_level is -0.1"),
    ({"noise_level": float("nan")}, "noise_level is nan"),
    ({"train_rows": 8193}, "train_rows is 8193; 'regimes' has 1 to 8192"),
    ({"train_rows": 0}, "train_rows is 0"),
    ({"seed": -1}, "data seed is -1"),
  ],
)
def test_bad_options_are_refused_in_one_line(options, message, data_dir):
  with pytest.raises(errors.UserError, match=message) as raised:
    _target("regimes", data_dir, **options)
  assert "\n" not in str(raised.value)


def test_unknown_task_lists_the_known_and_narrow_padding_is_refused(data_dir):
  with pytest.raises(errors.UserError, match=r"unknown data set 'boston'; known: friedman1, .*fl"):
    pipeline.describe_task("boston")
  with pytest.raises(errors.UserError, match="feature_dim is 9, but 'regimes' has 10 features"):
    pipeline.source_arrays("regimes", data_dir=data_dir, feature_dim=9)


def test_known_wordings_are_seen_ones_of_a_rows_own_target(data_dir):
  task, test = pipeline.describe_task("multi_target"), _target("multi_target", data_dir)["test"]
  known = pipeline.known_wordings(task, test)
  allowed = task.seen_paraphrases[test.target_id]
  assert (known.paraphrase_id[:, None] == allowed).any(axis=1).all()
  assert set(known.paraphrase_id) == set(task.seen_paraphrases[:6].ravel())
  assert known.features is test.features and known.targets is test.targets


def test_shuffled_wordings_keep_their_counts_and_say_nothing_of_the_target(data_dir):
  plain = _target("multi_target", data_dir)
  first, again, second = (pipeline.shuffled_wordings(plain, seed) for seed in (0, 0, 1))
  for split, arrays in plain.items():
    np.testing.assert_array_equal(
      np.sort(first[split].paraphrase_id), np.sort(arrays.paraphrase_id)
    )
    np.testing.assert_array_equal(first[split].paraphrase_id, again[split].paraphrase_id)
    matches_target = first[split].paraphrase_id // 12 == arrays.target_id
    assert abs(matches_target.mean() - 1 / 6) < 0.03  # chance level of six targets
    assert (first[split].paraphrase_id == second[split].paraphrase_id).all() == (split == "test")
