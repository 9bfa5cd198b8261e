"""The mesh of devices of a training, from its config.

Axes, from the slowest network to the fastest:

  slice   one copy of everything per TPU slice (or another group of devices with a slow network
          between groups)
  data    copies of everything, for a larger batch
  fsdp    the batch, the parameters and the optimiser state are split; parameters are gathered one
          layer at a time
  tensor  parameters and activations are split over heads, feed-forward and vocabulary

The batch is split over the first three axes (`DATA_AXES`); `sharding.py` splits the other arrays.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from qlora_jax import errors

AXES = ("slice", "data", "fsdp", "tensor")
DATA_AXES = ("slice", "data", "fsdp")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# The first rule whose mesh axes are unused in the array applies; an axis without a rule is not
# split. Kernels have an `embed` axis, which uses fsdp. Factors [rank, heads] have none, so that
# their second axis is split over tensor and fsdp.
DEFAULT_RULES: Rules = (
  ("embed", "fsdp"),
  ("vocabulary", "tensor"),
  ("heads", ("tensor", "fsdp")),
  ("heads", "tensor"),
  ("kv_heads", ("tensor", "fsdp")),
  ("kv_heads", "tensor"),
  ("mlp", ("tensor", "fsdp")),
  ("mlp", "tensor"),
)
# The axis names of the parameters of all models and adapters.
LOGICAL_AXES = (
  "atoms",
  "blocks",
  "embed",
  "features",
  "head_dim",
  "heads",
  "input",
  "instruction",
  "kv_heads",
  "mlp",
  "output",
  "prior",
  "query",
  "rank",
  "rank_out",
  "target",
  "vocabulary",
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes, and rules that split parameter axes over mesh axes.

  Attributes:
    slice, data, fsdp, tensor: sizes; one of them may be -1 and takes the remaining devices.
    rules: pairs (logical axis; a mesh axis, a tuple of mesh axes, or None); the first that fits
      applies.

  Raises:
    UserError: an impossible size, more than one -1, or a rule with an unknown axis.
  """

  slice: int = 1
  data: int = 1
  fsdp: int = -1
  tensor: int = 1
  rules: Rules = DEFAULT_RULES

  def __post_init__(self):
    for axis, size in zip(AXES, self.sizes, strict=True):
      if size < 1 and size != -1:
        raise errors.UserError(
          f"mesh.{axis}: {size} is not a size; use at least 1, or -1 for the remaining devices"
        )
    free = [axis for axis, size in zip(AXES, self.sizes, strict=True) if size == -1]
    if len(free) > 1:
      raise errors.UserError(f"mesh.{free[1]}: only one axis can be -1, and mesh.{free[0]} is")
    for name, target in self.rules:
      if name not in LOGICAL_AXES:
        raise errors.UserError(
          f"mesh.rules: no parameter has an axis {name!r}; use some of {', '.join(LOGICAL_AXES)}"
        )
      unknown = [axis for axis in axes_of(target) if axis not in AXES]
      if unknown:
        raise errors.UserError(
          f"mesh.rules: {name} cannot be split over {unknown[0]!r}; use some of {', '.join(AXES)}"
        )

  @property
  def sizes(self) -> tuple[int, int, int, int]:
    return (self.slice, self.data, self.fsdp, self.tensor)


def from_config(group: Mapping[str, Any]) -> MeshConfig:
  """The checked `MeshConfig` of the config's group `mesh`."""
  fields = dict(group)
  rules = tuple(
    (name, target if target is None or isinstance(target, str) else tuple(target))
    for name, target in fields.pop("rules", DEFAULT_RULES)
  )
  return MeshConfig(**fields, rules=rules)


def axes_of(target: str | Sequence[str] | None) -> tuple[str, ...]:
  """The mesh axes on the right side of a rule."""
  if target is None:
    return ()
  return (target,) if isinstance(target, str) else tuple(target)


def resolve(config: MeshConfig, count: int) -> tuple[int, int, int, int]:
  """The sizes for `count` devices, with -1 replaced.

  Raises:
    UserError: the product of the sizes is not `count`; the message gives the nearest valid sizes.
  """
  sizes, fixed = config.sizes, math.prod(size for size in config.sizes if size != -1)
  if -1 in sizes and count % fixed == 0:
    return tuple(count // fixed if size == -1 else size for size in sizes)
  if fixed == count and -1 not in sizes:
    return sizes
  requested = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
  valid = nearest(sizes, count)
  suggestion = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, valid, strict=True))
  devices = f"{count} device{'s' if count > 1 else ''}"
  if -1 in sizes:
    raise errors.UserError(
      f"mesh: {requested} does not fit {devices}: {fixed} does not divide {count};"
      f" nearest: {suggestion}"
    )
  raise errors.UserError(
    f"mesh: {requested} needs {fixed} devices, but there {'are' if count > 1 else 'is'} {count};"
    f" nearest: {suggestion}"
  )


def nearest(sizes: Sequence[int], count: int) -> tuple[int, ...]:
  """The factors of `count`, one per axis, with the smallest ratios to `sizes`; -1 is free."""

  def factors(count: int, axes: int):
    if axes == 1:
      yield (count,)
      return
    for first in (n for n in range(1, count + 1) if count % n == 0):
      for rest in factors(count // first, axes - 1):
        yield (first, *rest)

  def distance(candidate):
    return sum(abs(math.log(a / b)) for a, b in zip(candidate, sizes, strict=True) if b != -1)

  return min(factors(count, len(sizes)), key=distance)


def make(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """The mesh over `devices`, laid out for their network.

  `devices` are by default all devices of all processes; devices of a described topology work too.
  If the devices belong to several slices, the mesh axis `slice` runs over them, so that only its
  collectives use the network between slices.

  Raises:
    UserError: the sizes fit neither the number of devices nor the number of slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = resolve(config, len(devices))
  slices = {getattr(device, "slice_index", None) or 0 for device in devices}
  if len(slices) > 1:
    if sizes[0] % len(slices):
      raise errors.UserError(
        f"mesh.slice: {sizes[0]} is not a multiple of the number of slices, {len(slices)};"
        f" use mesh.slice={len(slices)}"
      )
    outer = (len(slices), 1, 1, 1)
    inner = (sizes[0] // len(slices), *sizes[1:])
    layout = _create_layout(
      lambda **options: mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **options)
    )
  else:
    layout = _create_layout(
      lambda **options: mesh_utils.create_device_mesh(sizes, devices, **options)
    )
  return jax.sharding.Mesh(layout, AXES)


def _create_layout(create) -> np.ndarray:
  try:
    return create()
  except NotImplementedError:  # a mesh axis that is only part of a physical axis
    return create(allow_split_physical_axes=True)


def data_shards(mesh: jax.sharding.Mesh) -> int:
  """The number of parts of the batch."""
  return math.prod(mesh.shape[axis] for axis in DATA_AXES)


def check_batch(mesh: jax.sharding.Mesh, batch_size: int, micro_batches: int = 1) -> None:
  """Checks that every device gets the same number of rows of each micro-batch.

  Raises:
    UserError: it does not; the message gives the nearest batch sizes that work.
  """
  shards = data_shards(mesh)
  rows = shards * micro_batches
  if batch_size % rows:
    axes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in DATA_AXES)
    below, above = batch_size // rows * rows, -(-batch_size // rows) * rows
    suggestion = f"{below} or {above}" if below else f"{above}"
    parts = f" and {micro_batches} micro-batches" if micro_batches > 1 else ""
    raise errors.UserError(
      f"optimizer.batch_size: {batch_size} rows cannot be split evenly over {shards} data shards"
      f" ({axes}){parts}; use {suggestion}"
    )
