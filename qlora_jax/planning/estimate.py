"""How long a step takes, by the slowest of compute, memory and networks.

Published peaks are never reached: `UTILISATION` of the peak FLOP/s is assumed while the chip
multiplies, and is stated wherever a time is. Collectives are taken to run over one dimension of the
torus at a time (its two links of a chip), which is what a ring along one mesh axis uses.
"""

import dataclasses
from collections.abc import Sequence

from qlora_jax.planning import flops as flops_lib
from qlora_jax.planning import hardware, hlo, program

UTILISATION = 0.55  # of the peak; well-tuned decoders reach 0.5 to 0.65 on TPUs


@dataclasses.dataclass(frozen=True)
class StepTime:
  """Seconds a step on each resource.

  Attributes:
    compute: hardware FLOPs at `UTILISATION` of the peak.
    memory: parameters and kept states moved between HBM and the cores.
    ici, dcn: collectives inside a slice, and between slices.
    model_flops: of the whole step, without recomputation; chips: of all slices; peak: FLOP/s.
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
    """Everything at once: the slowest decides. The estimate."""
    return max(self.compute, self.memory, self.ici, self.dcn)

  @property
  def serial(self) -> float:
    """Nothing at once: an upper bound under the same assumptions."""
    return self.compute + self.memory + self.ici + self.dcn

  @property
  def mfu(self) -> float:
    """Model FLOPs utilisation that the estimate means."""
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
  """See `StepTime`.

  Args:
    job: the step; topology: where it runs.
    flops: of the whole step.
    collectives: of a chip's program.
    gathered_base: bytes of the base that a chip reads in one pass over it.
    activations: bytes that a chip keeps for the gradient.
  """
  chip = topology.chip
  passes = (3 if job.model.config.remat == "full" else 2) * job.micro_batches
  moved = passes * gathered_base + 2 * activations
  link = chip.ici_bandwidth / 2 / chip.dimensions
  inside = sum(each.wire * each.times for each in collectives if not each.across)
  across = sum(each.wire * each.times for each in collectives if each.across)
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
  """Kind (and 'between slices') -> how many run in a step, and bytes a chip receives."""
  found: dict[str, dict[str, float]] = {}
  for each in collectives:
    name = f"{each.kind} between slices" if each.across else each.kind
    entry = found.setdefault(name, {"count": 0, "bytes": 0.0})
    entry["count"] += each.times
    entry["bytes"] += each.wire * each.times
  return dict(sorted(found.items()))


def of_routing(collectives: Sequence[hlo.Collective]) -> list[hlo.Collective]:
  """Collectives in the loop over blocks that the router, the memory or the summary asked for."""

  def asked(source: str) -> bool:
    source = source.replace("/mlp/gate/", "/")  # a map; the summary has a gate too
    return any(part in source for part in ("/router/", "/memory/", "/gate/"))

  return [each for each in collectives if each.times > 1 and asked(each.source)]
