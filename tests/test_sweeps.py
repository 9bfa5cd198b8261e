"""Composition of sweeps."""

import pytest

from qlora_jax import errors, sweeps


def test_product_varies_the_last_axis_fastest():
  points = sweeps.product(sweeps.sweep("a", [1, 2]), sweeps.sweep("b", [3, 4]))
  assert points == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]


def test_zipit_pairs_points_and_refuses_unequal_lengths():
  axes = sweeps.sweep("a", [1, 2]), sweeps.sweep("b", [3, 4])
  assert sweeps.zipit(*axes) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
  with pytest.raises(errors.UserError, match="lengths"):
    sweeps.zipit(axes[0], axes[1][:1])


def test_chainit_keeps_order():
  assert sweeps.chainit([{"a": 1}], [{"b": 2}]) == [{"a": 1}, {"b": 2}]


def test_a_field_set_to_two_values_is_refused():
  with pytest.raises(errors.UserError, match="set twice"):
    sweeps.product([{"a": 1}], [{"a": 2}])
