"""Topologies are read from their names; a wrong name is an error of one line."""

import math

import pytest

from qlora_jax import errors
from qlora_jax.planning import hardware


def test_every_listed_layout_is_a_topology_of_its_chip():
  for chip in hardware.CHIPS.values():
    for layout in chip.layouts:
      topology = hardware.parse(f"{chip.name}:{layout}")
      assert topology.chips == math.prod(int(size) for size in layout.split("x")) <= chip.pod
      assert topology.name == f"{chip.name}:{layout}"


def test_slices_multiply_chips_and_hosts():
  topology = hardware.parse("v5p:4x4x4", slices=2)
  assert (topology.chips_per_slice, topology.chips, topology.hosts) == (64, 128, 32)


@pytest.mark.parametrize(
  ("name", "slices", "named"),
  [
    ("v9:2x2", 1, "is unknown; use one of v4:"),
    ("v5p", 1, "is unknown"),
    ("v5p:4x4", 1, "3 dimensions"),
    ("v6e:3x4", 1, "first two sizes must be even"),
    ("v5e:32x32", 1, "1024 chips, but a v5e slice has at most 256"),
    ("v5e:4x4", 0, "--slices: 0"),
  ],
)
def test_a_wrong_topology_is_one_line(name, slices, named):
  with pytest.raises(errors.UserError, match=named) as caught:
    hardware.parse(name, slices)
  assert "\n" not in str(caught.value)
