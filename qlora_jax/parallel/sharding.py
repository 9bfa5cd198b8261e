"""The sharding of every array on the mesh.

Parameters are declared with logical axis names; the config's rules map these names to mesh axes. A
dimension is not split over a mesh axis that does not divide it, so that every model runs on every
mesh. `constrain` keeps activations on the shard of their token.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax import errors
from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.typing import Array, PyTree

_ACTIVATIONS = (("batch", mesh_lib.DATA_AXES), ("replicas", ("slice", "data")))
_RULES: contextvars.ContextVar[mesh_lib.Rules] = contextvars.ContextVar("rules", default=())


def spec(
  shape: Sequence[int], names: Sequence[str | None], sizes: dict[str, int], rules: mesh_lib.Rules
) -> P:
  """The partition of an array with named axes.

  The name 'batch' stands for all data axes, 'replicas' for the data axes that split no parameter.

  Args:
    shape: of the whole array.
    names: logical name of each axis, or None.
    sizes: of the mesh axes.
    rules: see `mesh.MeshConfig`.
  """
  mesh_axes: list[tuple[str, ...]] = [()] * len(shape)  # of each dimension
  used: set[str] = set()
  for rule_name, target in (*_ACTIVATIONS, *rules):
    axes = mesh_lib.axes_of(target)
    for dimension, name in enumerate(names):
      if name != rule_name or mesh_axes[dimension] or used.intersection(axes):
        continue
      axes = tuple(axis for axis in axes if sizes[axis] > 1)
      if axes and shape[dimension] % math.prod(sizes[axis] for axis in axes) == 0:
        mesh_axes[dimension] = axes
        used.update(axes)
  while mesh_axes and not mesh_axes[-1]:
    mesh_axes.pop()
  return P(*(axes[0] if len(axes) == 1 else axes or None for axes in mesh_axes))


def tree(mesh: Mesh, rules: mesh_lib.Rules, boxed: PyTree) -> PyTree:
  """`NamedSharding` of every leaf of a tree of shapes boxed with logical axes.

  Vectors (norm scales, biases) and leaves without a box are replicated, because gathering them
  costs more than the memory that they take. The result has the structure of the unboxed tree.
  """
  sizes = dict(mesh.shape)

  def leaf_sharding(leaf):
    if not isinstance(leaf, nn.LogicallyPartitioned) or len(set(leaf.names) - {"blocks"}) < 2:
      return NamedSharding(mesh, P())
    return NamedSharding(mesh, spec(leaf.value.shape, leaf.names, sizes, rules))

  return jax.tree.map(
    leaf_sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding with the whole array on every device."""
  return NamedSharding(mesh, P())


def rows(mesh: Mesh, leading: int = 0) -> NamedSharding:
  """The sharding of a batch by rows; the row axis follows `leading` other axes."""
  return NamedSharding(mesh, P(*[None] * leading, mesh_lib.DATA_AXES))


def batch(mesh: Mesh, like: PyTree, leading: int = 1) -> PyTree:
  """Shardings of a batch with the leaves of `like`: split by rows, after `leading` axes.

  A `language_step.LanguageBatch` has one leading axis, the micro-batches. Its answer places
  [X, A / X] are grouped by data shard, so that they are split the same way.
  """
  return jax.tree.map(lambda _: rows(mesh, leading), like)


def optimizer(
  tx: optax.GradientTransformation, state: PyTree, params: PyTree, mesh: Mesh
) -> PyTree:
  """Shardings of an optimiser state: moments like their parameters, everything else replicated.

  Args:
    tx: the transformation.
    state: its state, concrete or abstract.
    params: shardings of the parameters.
    mesh: of the result.
  """
  return optax.tree_map_params(
    tx,
    lambda _, param_sharding: param_sharding,
    state,
    params,
    transform_non_params=lambda _: replicated(mesh),
  )


@contextlib.contextmanager
def use(mesh: Mesh | None, rules: mesh_lib.Rules = mesh_lib.DEFAULT_RULES) -> Iterator[None]:
  """Inside, `constrain` shards the activations of traced functions over `mesh`.

  It has no effect without a mesh, or on a mesh of one device of the default platform.
  """
  if mesh is None or (mesh.size == 1 and mesh.devices.flat[0].platform == jax.default_backend()):
    yield
    return
  token = _RULES.set(rules)
  try:
    with jax.set_mesh(mesh):
      yield
  finally:
    _RULES.reset(token)


def current() -> tuple[dict[str, int], mesh_lib.Rules] | None:
  """Axis sizes and rules inside `use` on more than one device, else None."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or tuple(mesh.axis_names) != mesh_lib.AXES:
    return None
  return dict(mesh.shape), _RULES.get()


def constrain(x: Array, *names: str | None) -> Array:
  """x, with x and its cotangent sharded by the names of their axes; a no-op outside `use`."""
  sizes_and_rules = current()
  if sizes_and_rules is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(x.shape, names, *sizes_and_rules))


def tokens(x: Array) -> Array:
  """x [B, ...] sharded by rows, so that values of a token stay on the token's device."""
  return constrain(x, "batch", *[None] * (x.ndim - 1))


def shard_count() -> int:
  """X, the number of data shards of the current mesh; 1 outside `use`."""
  sizes_and_rules = current()
  if sizes_and_rules is None:
    return 1
  sizes, _ = sizes_and_rules
  return math.prod(sizes[axis] for axis in mesh_lib.DATA_AXES)


def _process_shards(mesh: Mesh) -> tuple[tuple[int, ...], int, int]:
  """(data shards of this process, index of this set of shards, number of distinct sets)."""
  holders: dict[int, list[int]] = {}
  for shard, devices in enumerate(mesh.devices.reshape(mesh_lib.data_shards(mesh), -1)):
    for process in {device.process_index for device in devices}:
      holders.setdefault(process, []).append(shard)
  sets = sorted({tuple(shards) for shards in holders.values()})
  if sum(map(len, sets)) != mesh_lib.data_shards(mesh) or len(set(map(len, sets))) > 1:
    raise errors.UserError(
      "mesh: the processes do not hold equal parts of the batch; use a mesh.tensor that divides the"
      " devices of a process, or is a multiple of them"
    )
  local_shards = tuple(holders[jax.process_index()])
  return local_shards, sets.index(local_shards), len(sets)


def own_rows(mesh: Mesh) -> tuple[int, int]:
  """(index, count) of this process's part of the batch, for a Grain shard.

  Processes with the same rows (tensor parallelism across processes) have the same index.

  Raises:
    UserError: the processes hold unequal parts of the batch.
  """
  return _process_shards(mesh)[1:]


def place(mesh: Mesh, tree: PyTree, leading: int = 1) -> PyTree:
  """The global batch from the rows of this process, for every leaf; see `rows`.

  The data shards of a process take its rows in order, at any position on the mesh.
  """
  local_shards, _, parts = _process_shards(mesh)
  sharding, shards = rows(mesh, leading), mesh_lib.data_shards(mesh)

  def place_leaf(leaf):
    leaf = np.asarray(leaf)
    size = leaf.shape[leading] * parts // shards
    shape = (*leaf.shape[:leading], size * shards, *leaf.shape[leading + 1 :])

    def shard(index):
      first = local_shards.index((index[leading].start or 0) // size) * size
      return leaf[(slice(None),) * leading + (slice(first, first + size),)]

    return jax.make_array_from_callback(shape, sharding, shard)

  return jax.tree.map(place_leaf, tree)


def gathered(tree: PyTree) -> Any:
  """Host copies of whole arrays, also of shards of other processes; a collective call."""
  from jax.experimental import multihost_utils

  def gather_leaf(leaf):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
      return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

  return jax.tree.map(gather_leaf, tree)
