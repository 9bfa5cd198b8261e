"""Searches for the nearest change of mesh, remat, micro-batches or topology with which a step fits.

The search uses the estimate of `memory.py`, scaled by the compiled size of the requested step; the
plan then compiles the changes.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

from qlora_jax.models import decoder
from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.planning import hardware, memory, program

_REMAT_SAVING = {"none": 0, "dots": 1, "full": 2}  # a higher level saves more memory


@dataclasses.dataclass(frozen=True)
class Change:
  """A change with which the step should fit.

  Attributes:
    job: the changed step.
    topology: its chips; can be larger than requested.
    flags: command-line flags of the change.
    bytes: estimated bytes per chip.
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
  """Yields changes with which the step should fit, the nearest first; larger topologies last.

  Args:
    job: the step that does not fit.
    topology: its chips.
    scale: ratio of the compiled bytes of `job` to its estimate.
  """
  larger = [
    hardware.parse(f"{topology.chip.name}:{layout}", topology.slices)
    for layout in topology.chip.layouts
  ]
  for chips in [topology, *(option for option in larger if option.chips > topology.chips)]:
    limit = chips.chip.hbm * (1 - memory.RESERVED)
    changes = []
    for candidate in _candidates(job, chips):
      need = int(scale * estimated(candidate, chips).total)
      if need <= limit:
        flags, distance = _difference(job, candidate, topology, chips)
        changes.append((distance, need, Change(candidate, chips, flags, need)))
    yield from (change for _, _, change in sorted(changes, key=lambda entry: entry[:2]))


def _candidates(job: program.Job, topology: hardware.Topology) -> Iterator[program.Job]:
  shape = job.model.config
  remats = [kind for kind, level in _REMAT_SAVING.items() if level >= _REMAT_SAVING[shape.remat]]
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
  """Mesh sizes in which the tensor axis divides the query heads and the KV heads."""
  chips = topology.chips_per_slice
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
  """(flags, distance) of a change: octaves of the mesh axes, remat, micro-batches and topology."""
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
    distance += _REMAT_SAVING[now] - _REMAT_SAVING[was]
  if old.micro_batches != new.micro_batches:
    flags.append(f"--config.optimizer.micro_batches={new.micro_batches}")
    distance += 2 * math.log2(new.micro_batches / old.micro_batches)
  return tuple(flags), distance
