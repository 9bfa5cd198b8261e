"""Estimates the time of a step: the slowest of compute, memory and networks.

No program reaches the published peaks: matrix products are assumed to reach `UTILISATION` of the
peak FLOP/s, and every output with a time states this share. Collectives are assumed to use one
dimension of the torus at a time, that is two links per chip, as a ring along one mesh axis does.
"""

import dataclasses
from collections.abc import Sequence

from qlora_jax.planning import flops as flops_lib
from qlora_jax.planning import hardware, hlo, program

UTILISATION = 0.55  # of the peak; well-tuned decoders reach 0.5 to 0.65 on TPUs


@dataclasses.dataclass(frozen=True)
class StepTime:
  """Seconds per step on each resource.

  Attributes:
    compute: hardware FLOPs at `UTILISATION` of the peak.
    memory: parameters and saved activations, moved between HBM and the cores.
    ici, dcn: collectives inside a slice, and between slices.
    model_flops: of the whole step, without recomputation.
    chips: of all slices.
    peak: FLOP/s per chip.
  """

  compute: float
  memory: float
  ici: float
  dcn: float
  model_flops: float
  chips: int
  peak: float

  @property
  def overlapped(self) -> float:
    """The estimate: all resources work at the same time, and the slowest decides."""
    return max(self.compute, self.memory, self.ici, self.dcn)

  @property
  def serial(self) -> float:
    """An upper bound under the same assumptions: the resources work one after another."""
    return self.compute + self.memory + self.ici + self.dcn

  @property
  def mfu(self) -> float:
    """Model FLOPs utilisation at the estimated time."""
    return self.model_flops / (self.overlapped * self.chips * self.peak)

  @property
  def bound(self) -> str:
    """The resource that decides."""
    names = ("compute", "memory", "ici", "dcn")
    return max(names, key=lambda name: getattr(self, name))


def step_time(
  job: program.Job,
  topology: hardware.Topology,
  flops: flops_lib.Flops,
  collectives: Sequence[hlo.Collective],
  gathered_base: float,
  activations: float,
) -> StepTime:
  """The estimated `StepTime` of a job.

  Args:
    job: the step.
    topology: the chips.
    flops: of the whole step.
    collectives: of the program of one chip.
    gathered_base: bytes of the base that a chip reads per pass.
    activations: bytes that a chip saves for the gradient.
  """
  chip = topology.chip
  passes = (3 if job.model.config.remat == "full" else 2) * job.micro_batches
  moved = passes * gathered_base + 2 * activations
  link = chip.ici_bandwidth / 2 / chip.dimensions
  inside = sum(entry.wire * entry.times for entry in collectives if not entry.across)
  across = sum(entry.wire * entry.times for entry in collectives if entry.across)
  return StepTime(
    flops.hardware / (topology.chips * chip.flops * UTILISATION),
    moved / chip.hbm_bandwidth,
    inside / link,
    across / chip.dcn_bandwidth,
    flops.model,
    topology.chips,
    chip.flops,
  )


def by_kind(collectives: Sequence[hlo.Collective]) -> dict[str, dict[str, float]]:
  """Kind (and 'between slices') -> number per step, and bytes that a chip receives per step."""
  totals: dict[str, dict[str, float]] = {}
  for collective in collectives:
    kind = f"{collective.kind} between slices" if collective.across else collective.kind
    total = totals.setdefault(kind, {"count": 0, "bytes": 0.0})
    total["count"] += collective.times
    total["bytes"] += collective.wire * collective.times
  return dict(sorted(totals.items()))


def of_routing(collectives: Sequence[hlo.Collective]) -> list[hlo.Collective]:
  """The collectives of the router, the memory and the summary in the loop over blocks."""

  def is_routing(source: str) -> bool:
    source = source.replace("/mlp/gate/", "/")  # a map; the summary's gate is /gate/ too
    return any(part in source for part in ("/router/", "/memory/", "/gate/"))

  return [entry for entry in collectives if entry.times > 1 and is_routing(entry.source)]
