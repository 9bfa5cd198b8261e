"""Points of the scaling study, and the cost of each beyond LoRA of its rank, by formula."""

import dataclasses
import functools
import itertools
from typing import Any

from qlora_jax.adapters import config as adapter_config
from qlora_jax.adapters import contraction, sizing
from qlora_jax.models import architectures, decoder, families
from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.planning import flops, hardware, memory, program, search
from qlora_jax.training import optimizer as optimizer_lib

ATOMS = (16, 64, 256, 1024, 4096)
KEPT = (2, 4, 8, 0)  # 0 keeps all M
RANKS = (8, 16, 64)
ROWS, LENGTH = 64, 4096


@dataclasses.dataclass(frozen=True)
class Scale:
  """A model and its chips, with one router per layer and blocks recomputed for the gradient."""

  name: str
  architecture: str
  topology: str
  fsdp: int
  tensor: int


SCALES = {
  scale.name: scale
  for scale in (
    Scale("8B", "llama3-8b", "v5p:2x2x4", 16, 1),
    Scale("70B", "llama3-70b", "v5p:4x4x4", 16, 4),
    Scale("405B", "llama3-405b", "v5p:8x8x8", 64, 8),
  )
}


@dataclasses.dataclass(frozen=True, order=True)
class Point:
  """One setting; `kept` 0 keeps all atoms, `atoms` 0 is LoRA."""

  scale: str
  atoms: int
  kept: int
  rank: int

  @property
  def adapter(self) -> adapter_config.AdapterConfig:
    if not self.atoms:
      return adapter_config.AdapterConfig(family="lora", rank=self.rank)
    return adapter_config.AdapterConfig(rank=self.rank, atoms=self.atoms, top_k=self.kept)

  @property
  def lora(self) -> "Point":
    return Point(self.scale, 0, 0, self.rank)

  @property
  def label(self) -> str:
    if not self.atoms:
      return f"{self.scale} LoRA R={self.rank}"
    return f"{self.scale} M={self.atoms} k={self.kept or 'M'} R={self.rank}"


TARGET = Point("70B", 64, 4, 16)


def grid() -> list[Point]:
  """Every point: sizes x M x k x R."""
  return [Point(*fields) for fields in itertools.product(SCALES, ATOMS, KEPT, RANKS)]


@functools.cache
def shape_of(scale: str) -> decoder.DecoderConfig:
  """The decoder of a scale."""
  return families.config_from_hf(
    architectures.config(SCALES[scale].architecture),
    layers_per_block=1,
    base_dtype="bfloat16",
    dtype="bfloat16",
    remat="full",
  )


def job_of(point: Point) -> tuple[program.Job, hardware.Topology]:
  """The step of a point, and its chips."""
  scale = SCALES[point.scale]
  topology = hardware.parse(scale.topology)
  layout = mesh_lib.MeshConfig(fsdp=scale.fsdp, tensor=scale.tensor)
  model = decoder.Decoder(shape_of(point.scale), point.adapter)
  optimizer = optimizer_lib.OptimizerConfig(batch_size=ROWS)
  return program.Job(model, optimizer, layout, LENGTH), topology


@functools.cache
def plain_hbm(scale: str, rank: int) -> int:
  """Estimated bytes per chip of LoRA."""
  return search.estimated(*job_of(Point(scale, 0, 0, rank))).total


def costs(point: Point) -> dict[str, float]:
  """FLOPs of a step, parameters, bytes per chip, and bytes of the memory's gradient sum."""
  job, _ = job_of(point)
  shape, adapter = job.model.config, job.model.adapter
  work = flops.step(shape, adapter, ROWS, LENGTH, ROWS * LENGTH)
  network = shape.network()
  trained = sizing.count(adapter, network)
  shared = trained - sizing.count(point.lora.adapter, network)
  routing = memory.routing_bytes(shape, adapter, ROWS * LENGTH / job.mesh.fsdp)
  # All chips hold the memory, the routers, their gradients and their two moments, in float32.
  hbm = plain_hbm(point.scale, point.rank) + 4 * memory.FLOAT32 * shared + sum(routing.values())
  return {
    "flops": work.model,
    "params": trained,
    "hbm": hbm,
    # The only collective: gradients of what all chips hold are summed over the data shards.
    "collective": 2 * (job.mesh.fsdp - 1) / job.mesh.fsdp * memory.FLOAT32 * shared,
  }


def extra(point: Point) -> dict[str, Any]:
  """Cost of a point beyond LoRA of its rank, in absolute numbers and in per cent of LoRA."""
  routed, plain = costs(point), costs(point.lora)
  shape = shape_of(point.scale)
  maps = shape.layers_per_block * len(shape.adapted)
  row: dict[str, Any] = {
    "scale": point.scale,
    "atoms": point.atoms,
    "kept": point.kept or point.atoms,
    "dense": not point.kept,
    "rank": point.rank,
    "order": contraction.choose(point.adapter, maps),
    "lora_flops": plain["flops"],
    "lora_params": plain["params"],
    "lora_hbm": plain["hbm"],
  }
  for name in ("flops", "params", "hbm"):
    row[f"extra_{name}"] = routed[name] - plain[name]
    row[f"extra_{name}_percent"] = 100 * (routed[name] / plain[name] - 1)
  row["extra_collective_bytes"] = routed["collective"]
  return row
