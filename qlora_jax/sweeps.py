"""Sweeps: lists of points, each a dict from a dotted config field to its value."""

import itertools
from collections.abc import Iterable, Sequence

from qlora_jax import errors

Point = dict


def sweep(field: str, values: Sequence) -> list[Point]:
  """One point a value of `field`; an empty list of values is a UserError."""
  if not len(values):
    raise errors.UserError(f"sweep of {field}: the list is empty; give at least one value")
  return [{field: value} for value in values]


def product(*axes: Iterable[Point]) -> list[Point]:
  """Every combination of one point an axis; the last axis varies fastest."""
  return [_merge(points) for points in itertools.product(*axes)]


def zipit(*axes: Sequence[Point]) -> list[Point]:
  """The i-th points of all axes merged; axes must be equally long."""
  if len({len(axis) for axis in axes}) > 1:
    lengths = [len(axis) for axis in axes]
    raise errors.UserError(f"zipit: the axes have lengths {lengths}; make them equal")
  return [_merge(points) for points in zip(*axes, strict=True)]


def chainit(*axes: Iterable[Point]) -> list[Point]:
  """The axes' points one after another."""
  return list(itertools.chain(*axes))


def check_variant(arg: str, known: Sequence[str]) -> None:
  """A UserError unless `arg`, the part of --config after the colon, is known."""
  if arg not in known:
    names = ", ".join(name for name in known if name)
    raise errors.UserError(f"--config: unknown variant {arg!r}; use one of {names}, or none")


def _merge(points: Iterable[Point]) -> Point:
  merged: Point = {}
  for point in points:
    for field, value in point.items():
      if merged.setdefault(field, value) != value:
        raise errors.UserError(f"sweep: {field} is set twice, to {merged[field]!r} and {value!r}")
  return merged
