"""Real tables: declared features, no leakage, and one-line errors for bad input."""

import importlib.util

import numpy as np
import pandas as pd
import pytest

from qlora_jax import errors
from qlora_jax.data import encodings, table_regression, tables

_ROWS = {"bikeshare": 8645, "house_prices": 21436, "avocados": 15207, "flights": 40_000}

# Columns with the target, parts of it, values that are known only after it, or the domain.
_FORBIDDEN = {
  "bikeshare": {"bikers", "casual", "registered", "season", "mnth", "day"},
  "house_prices": {"price", "zipcode", "lat", "long", "id"},
  "avocados": {"average_price", "region"},
  "flights": {
    *("arr_delay", "dep_delay", "dep_time", "arr_time", "air_time", "origin", "time_hour"),
    *("tailnum", "flight"),
  },
}


@pytest.fixture(scope="module")
def frames():
  return {name: tables.read_table(name) for name in tables.TABLES}


@pytest.fixture(scope="module")
def encoded(frames):
  return {name: tables.encode_table(frames[name], name) for name in tables.TABLES}


@pytest.mark.parametrize("name", tables.TABLES)
def test_features_are_finite_named_and_at_most_24(encoded, name):
  features, spec = encoded[name].features, tables.TABLES[name]
  assert features.shape == (_ROWS[name], len(spec.feature_names)) and features.shape[1] <= 24
  assert np.isfinite(features).all() and np.isfinite(encoded[name].target).all()
  assert len(set(spec.feature_names)) == len(spec.feature_names)


@pytest.mark.parametrize("name", tables.TABLES)
def test_no_feature_reads_the_target_or_a_leaked_column_or_the_domain(frames, encoded, name):
  spec = tables.TABLES[name]
  assert not set(spec.feature_columns) & _FORBIDDEN[name]
  # The encodings read only their declared columns: they work without the other columns.
  selected_rows, _ = spec.select(frames[name])
  for encoding in spec.encodings:
    encoding.encode(selected_rows[list(encoding.columns)].head(10))


@pytest.mark.parametrize("name", tables.TABLES)
def test_no_single_feature_nearly_is_the_target(encoded, name):
  features, target = encoded[name].features, encoded[name].target
  varying = features[:, features.std(axis=0) > 0]
  correlations = np.corrcoef(np.column_stack([varying, target]), rowvar=False)[-1, :-1]
  assert np.abs(correlations).max() < 0.97


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_domain_has_rows(encoded, name):
  spec = tables.TABLES[name]
  assert set(encoded[name].domain) == {*spec.source_names, *spec.target_names}


def test_dropped_rows_are_counted(encoded):
  assert encoded["bikeshare"].dropped == {}
  assert encoded["flights"].dropped["no arrival delay (cancelled or diverted)"] == 12_534
  assert encoded["avocados"].dropped == {"region that sums others": 9 * 338}
  assert sum(encoded["flights"].dropped.values()) == 435_352 - 40_000


@pytest.mark.parametrize("name", tables.TABLES)
def test_splits_are_disjoint_and_complete(encoded, name):
  numbered = tables.EncodedTable(
    features=np.arange(_ROWS[name], dtype=float)[:, None],
    target=encoded[name].target,
    domain=encoded[name].domain,
    dropped={},
  )
  splits = table_regression.split_table(name, numbered)
  rows = np.concatenate([columns["features"][:, 0] for columns in splits.values()])
  np.testing.assert_array_equal(np.sort(rows), np.arange(_ROWS[name]))
  num_targets = len(tables.TABLES[name].target_names)
  for split, columns in splits.items():
    assert ((columns["target_id"] >= num_targets) == split.startswith("source_")).all()
    assert ((columns["paraphrase_id"] % 12 >= 8) == (split == "test")).all()


def test_a_seed_divides_the_pool_and_another_seed_divides_it_differently(encoded):
  pool = table_regression.split_table("avocados", encoded["avocados"])["pool"]
  pool["features"] = np.arange(len(pool["clean"]))[:, None]
  first, again, other = (table_regression.split_pool("avocados", pool, s) for s in (0, 0, 1))
  np.testing.assert_array_equal(first["train"]["features"], again["train"]["features"])
  assert not np.array_equal(first["train"]["features"], other["train"]["features"])
  for split in (first, other):
    rows = np.concatenate([split[part]["features"] for part in ("train", "validation")])
    np.testing.assert_array_equal(np.sort(rows, axis=0), pool["features"])


def test_training_rows_are_capped(encoded):
  pool = table_regression.split_table("flights", encoded["flights"])["pool"]
  assert len(table_regression.split_pool("flights", pool, 0)["train"]["clean"]) == 8192


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_value_names_its_row_and_column(frames, bad):
  frame = frames["bikeshare"].copy()
  frame.loc[17, "hum"] = bad
  with pytest.raises(errors.UserError, match=r"^table 'bikeshare', row 17, column 'hum': .*$"):
    tables.encode_table(frame, "bikeshare")


def test_bad_row_keeps_its_number_in_the_file_after_rows_are_dropped(frames):
  frame = frames["avocados"].copy()
  row = frame.index[frame["region"] == "Tampa"][5]
  frame.loc[row, "average_price"] = np.nan
  with pytest.raises(errors.UserError, match=f"row {row}, column 'average_price'"):
    tables.encode_table(frame, "avocados")


def test_missing_column_lists_those_present(frames):
  frame = frames["bikeshare"].rename(columns={"temp": "temperature"})
  with pytest.raises(errors.UserError, match=r"no column 'temp'; it has: season, .*temperature"):
    tables.validate_table(frame, "bikeshare")
  for column in ("region", "average_price"):
    with pytest.raises(errors.UserError, match=f"no column '{column}'"):
      tables.encode_table(frames["avocados"].drop(columns=column), "avocados")


def test_unknown_domain_names_its_row(frames):
  frame = frames["avocados"].copy()
  frame.loc[3, "region"] = "Atlantis"
  with pytest.raises(errors.UserError, match=r"row 3, column 'region': 'Atlantis' is in none"):
    tables.encode_table(frame, "avocados")


def test_unknown_table_lists_the_known():
  with pytest.raises(errors.UserError, match=r"'boston'; known: bikeshare, house_prices"):
    tables.table("boston")


def test_missing_wheel_says_how_to_install_it_in_one_line(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.UserError, match="needs the wheel 'ISLP'") as raised:
    tables.table_path("bikeshare")
  message = str(raised.value)
  assert "\n" not in message
  assert "pip install --no-deps --require-hashes -r requirements-data.txt" in message


def test_cyclic_encoding_puts_the_last_hour_next_to_the_first():
  (encoding,) = encodings.cyclic("hour", ["hr"], lambda frame: frame["hr"] / 24)
  points = encoding.encode(pd.DataFrame({"hr": [23, 0, 1, 12]}))
  assert encoding.names == ("hour_sin", "hour_cos")
  np.testing.assert_allclose(
    np.linalg.norm(points[0] - points[1]), np.linalg.norm(points[1] - points[2])
  )


def test_one_hot_is_all_zero_for_an_unlisted_value():
  (encoding,) = encodings.one_hot("carrier", ("UA", "DL"))
  values = encoding.encode(pd.DataFrame({"carrier": ["DL", "HA"]}))
  np.testing.assert_array_equal(values, [[0, 1], [0, 0]])
