"""Published figures of TPU chips, and the topologies that a plan accepts.

Sources: the system architecture pages of Cloud TPU (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e)
as of 2026, and "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus) for the network
between hosts of v4. All figures are per chip; bandwidths are bytes per second.
"""

import dataclasses
import math
import re

from qlora_jax import errors

GIB = 2**30
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of TPU chip.

  Attributes:
    name: the part of a topology's name before the colon.
    flops: peak bfloat16 FLOP/s.
    hbm: bytes of memory.
    hbm_bandwidth: between memory and cores.
    ici_bandwidth: of all links of a chip to its neighbours, sum of both directions.
    dcn_bandwidth: a chip's share of its host's network to other slices, one direction.
    host_memory: bytes of RAM per host.
    chips_per_host: number of chips that share a host.
    dimensions: of the torus.
    pod: maximum number of chips per slice.
    layouts: common slices that Cloud TPU offers.
    options: of the topology's description, so that one device is one chip.
  """

  name: str
  flops: float
  hbm: float
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float
  host_memory: float
  chips_per_host: int
  dimensions: int
  pod: int
  layouts: tuple[str, ...]
  options: tuple[tuple[str, str], ...] = ()


_CUBES = (
  "2x2x1",
  "2x2x2",
  "2x2x4",
  "2x4x4",
  "4x4x4",
  "4x4x8",
  "4x8x8",
  "8x8x8",
  "8x8x16",
  "8x16x16",
  "16x16x16",
)
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

CHIPS = {
  chip.name: chip
  for chip in (
    # Six links of 50 GB/s, both directions; two cores that run as one ("megacore").
    Chip(
      "v4",
      275e12,
      32 * GIB,
      1228 * GB,
      300 * GB,
      6.25 * GB,
      407 * GIB,
      4,
      3,
      4096,
      _CUBES,
      (("chip_config_name", "megacore"),),
    ),
    # 6.4 Tbit/s between pods of 256 chips.
    Chip("v5e", 197e12, 16 * GIB, 819 * GB, 400 * GB, 3.125 * GB, 512 * GIB, 8, 2, 256, _SQUARES),
    Chip(
      "v5p",
      459e12,
      95 * GIB,
      2765 * GB,
      1200 * GB,
      6.25 * GB,
      448 * GIB,
      4,
      3,
      6144,
      (*_CUBES, "16x16x24"),
    ),
    # 25.6 Tbit/s between pods of 256 chips.
    Chip("v6e", 918e12, 32 * GIB, 1638 * GB, 800 * GB, 12.5 * GB, 1536 * GIB, 8, 2, 256, _SQUARES),
  )
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """`slices` equal slices of chips; `layout` is the extent of one slice, such as (4, 4, 4)."""

  chip: Chip
  layout: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    return f"{self.chip.name}:{'x'.join(map(str, self.layout))}"

  @property
  def chips_per_slice(self) -> int:
    return math.prod(self.layout)

  @property
  def chips(self) -> int:
    return self.slices * self.chips_per_slice

  @property
  def hosts(self) -> int:
    return self.slices * -(-self.chips_per_slice // self.chip.chips_per_host)


def known() -> str:
  """The common topologies, as text for messages."""
  return "; ".join(f"{chip.name}:{{{','.join(chip.layouts)}}}" for chip in CHIPS.values())


def parse(name: str, slices: int = 1) -> Topology:
  """The topology with a name such as 'v5p:4x4x4'.

  Every layout of the chip's network is valid: two (v5e, v6e) or three (v4, v5p) numbers, the first
  two even, up to the size of a pod.

  Raises:
    UserError: the chip is unknown or does not have the layout; the message lists common topologies.
  """
  matched = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
  chip = CHIPS.get(matched[1]) if matched else None
  layout = tuple(int(size) for size in matched[2].split("x")) if matched else ()
  problem = None
  if chip is None:
    problem = "is unknown"
  elif len(layout) != chip.dimensions:
    problem = f"does not exist: the network of {chip.name} has {chip.dimensions} dimensions"
  elif min(layout) < 1 or layout[0] % 2 or layout[1] % 2:
    problem = "does not exist: the first two sizes must be even, because a host has 2 x 2 chips"
  elif math.prod(layout) > chip.pod:
    problem = f"has {math.prod(layout)} chips, but a {chip.name} slice has at most {chip.pod}"
  if problem:
    raise errors.UserError(f"--topology: {name!r} {problem}; use one of {known()}")
  if slices < 1:
    raise errors.UserError(f"--slices: {slices} is not at least 1")
  return Topology(chip, layout, slices)
