"""The nearest change of mesh, recomputation or micro-batches with which a step fits.

Everything is searched by the estimate of `memory.py`, scaled by what the compiler said about the
step that was asked for; the plan then compiles what is found.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

from qlora_jax.models import decoder
from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.planning import hardware, memory, program

_REMAT_MEMORY = {"none": 0, "dots": 1, "full": 2}


@dataclasses.dataclass(frozen=True)
class Change:
  """A job that is expected to fit, how it differs, and the estimated bytes a chip.

  Attributes:
    flags: command-line flags that make the change; topology: where, perhaps a larger one.
  """

  job: program.Job
  topology: hardware.Topology
  flags: tuple[str, ...]
  bytes: int

  @property
  def text(self) -> str:
    return " ".join(self.flags)


def estimated(job: program.Job, topology: hardware.Topology) -> memory.Memory:
  """`memory.estimate` of a job on the chips of a topology."""
  sizes = dict(zip(mesh_lib.AXES, mesh_lib.resolve(job.mesh, topology.chips), strict=True))
  shards = math.prod(sizes[axis] for axis in mesh_lib.DATA_AXES)
  answers = job.places(shards) * shards * job.micro_batches
  return memory.estimate(
    job.model, sizes, job.mesh.rules, job.rows, job.length, answers, job.micro_batches
  )


def nearest(job: program.Job, topology: hardware.Topology, scale: float = 1.0) -> Iterator[Change]:
  """Changes with which the step should fit, the nearest first; larger topologies last.

  Args:
    job: that does not fit.
    topology: its chips.
    scale: compiled bytes of `job` over its estimate.
  """
  larger = [
    hardware.parse(f"{topology.chip.name}:{layout}", topology.slices)
    for layout in topology.chip.layouts
  ]
  for place in [topology, *(each for each in larger if each.chips > topology.chips)]:
    limit = place.chip.hbm * (1 - memory.RESERVED)
    found = []
    for candidate in _candidates(job, place):
      need = int(scale * estimated(candidate, place).total)
      if need <= limit:
        flags, distance = _difference(job, candidate, topology, place)
        found.append((distance, need, Change(candidate, place, flags, need)))
    yield from (each for _, _, each in sorted(found, key=lambda each: each[:2]))


def _candidates(job: program.Job, topology: hardware.Topology) -> Iterator[program.Job]:
  shape = job.model.config
  remats = [kind for kind, saved in _REMAT_MEMORY.items() if saved >= _REMAT_MEMORY[shape.remat]]
  parts = [job.micro_batches * 2**power for power in range(4)]
  for sizes in _meshes(shape, topology):
    shards = topology.slices * sizes["data"] * sizes["fsdp"]
    for remat, micro_batches in itertools.product(remats, parts):
      if job.rows % (shards * micro_batches):
        continue
      model = decoder.Decoder(dataclasses.replace(shape, remat=remat), job.model.adapter)
      yield dataclasses.replace(
        job,
        model=model,
        mesh=dataclasses.replace(job.mesh, **sizes),
        micro_batches=micro_batches,
      )


def _meshes(
  shape: decoder.DecoderConfig, topology: hardware.Topology
) -> Iterator[Mapping[str, int]]:
  """Sizes that the heads allow: tensor parallelism is kept inside the key-value heads."""
  chips = topology.chips_a_slice
  for tensor in (1, 2, 4, 8, 16):
    if chips % tensor or shape.heads % tensor or shape.groups % tensor:
      continue
    for fsdp in (n for n in range(1, chips // tensor + 1) if chips // tensor % n == 0):
      yield {
        "slice": topology.slices,
        "data": chips // tensor // fsdp,
        "fsdp": fsdp,
        "tensor": tensor,
      }


def _difference(
  old: program.Job, new: program.Job, before: hardware.Topology, after: hardware.Topology
) -> tuple[tuple[str, ...], float]:
  """(Flags of the change, how far it is: mesh axes in octaves, recomputation and parts)."""
  flags, distance = [], 0.0
  if after != before:
    flags.append(f"--topology={after.name}")
    distance += 4 * math.log2(after.chips / before.chips)
  sizes = (
    mesh_lib.nearest(old.mesh.sizes, after.chips)
    if after != before
    else (mesh_lib.resolve(old.mesh, before.chips))
  )
  for axis, was, now in zip(mesh_lib.AXES, sizes, new.mesh.sizes, strict=True):
    if was != now:
      flags.append(f"--config.mesh.{axis}={now}")
      distance += abs(math.log2(now / was))
  was, now = old.model.config.remat, new.model.config.remat
  if was != now:
    flags.append(f"--config.model.remat={now}")
    distance += _REMAT_MEMORY[now] - _REMAT_MEMORY[was]
  if old.micro_batches != new.micro_batches:
    flags.append(f"--config.optimizer.micro_batches={new.micro_batches}")
    distance += 2 * math.log2(new.micro_batches / old.micro_batches)
  return tuple(flags), distance
