"""Declared features of a table: each turns named columns into named float features."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd


@dataclasses.dataclass(frozen=True)
class Encoding:
  """One or more features that are computed from columns.

  Attributes:
    names: names of the features.
    columns: names of all columns that `encode` reads.
    encode: maps a frame of n rows to float64 [n, len(names)].
  """

  names: tuple[str, ...]
  columns: tuple[str, ...]
  encode: Callable[[pd.DataFrame], np.ndarray]


def numeric(*columns: str) -> list[Encoding]:
  """One feature per column: the column's value, unchanged."""
  return [
    Encoding((column,), (column,), lambda frame, column=column: _floats(frame[column])[:, None])
    for column in columns
  ]


def log1p(*columns: str) -> list[Encoding]:
  """log(1 + value), for sizes and volumes with a heavy right tail."""
  return [
    Encoding(
      (f"log_{column}",),
      (column,),
      lambda frame, column=column: np.log1p(_floats(frame[column]))[:, None],
    )
    for column in columns
  ]


def cyclic(
  name: str,
  columns: Sequence[str],
  phase: Callable[[pd.DataFrame], np.ndarray],
) -> list[Encoding]:
  """Sine and cosine of 2π phase, so that the last hour is close to the first.

  Args:
    name: stem of the two features' names.
    columns: columns that `phase` reads.
    phase: maps a frame of n rows to [n], in cycles (1 is a whole cycle).
  """

  def encode(frame):
    angle = 2 * np.pi * np.asarray(phase(frame), np.float64)
    return np.stack([np.sin(angle), np.cos(angle)], axis=1)

  return [Encoding((f"{name}_sin", f"{name}_cos"), tuple(columns), encode)]


def one_hot(column: str, values: Sequence[str]) -> list[Encoding]:
  """One indicator per listed value; any other value gives all zeros."""

  def encode(frame):
    return np.stack([(frame[column] == value).to_numpy(np.float64) for value in values], axis=1)

  return [Encoding(tuple(f"{column}={value}" for value in values), (column,), encode)]


def derived(
  name: str, columns: Sequence[str], function: Callable[[pd.DataFrame], np.ndarray]
) -> list[Encoding]:
  """One feature computed from several columns."""
  return [Encoding((name,), tuple(columns), lambda frame: _floats(function(frame))[:, None])]


def _floats(values) -> np.ndarray:
  return np.asarray(values, np.float64)
