"""Which array lies how on the mesh.

Parameters carry the names of their axes from where they are declared; the config's rules map names
to axes of the mesh. A dimension that a mesh axis does not divide is not split over it, so that any
model runs on any mesh. Activations are held to their token's shard by `constrain`.
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
  """How an array of `shape` with named axes is split.

  'batch' stands for the data axes, 'replicas' for those of them that split no parameter.

  Args:
    shape: of the whole array.
    names: logical name of each axis, or None.
    sizes: of the mesh's axes.
    rules: see `mesh.MeshConfig`.
  """
  found: list[tuple[str, ...]] = [()] * len(shape)
  used: set[str] = set()
  for name, target in (*_ACTIVATIONS, *rules):
    axes = mesh_lib.axes_of(target)
    for place, own in enumerate(names):
      if own != name or found[place] or used.intersection(axes):
        continue
      axes = tuple(axis for axis in axes if sizes[axis] > 1)
      if axes and shape[place] % math.prod(sizes[axis] for axis in axes) == 0:
        found[place] = axes
        used.update(axes)
  while found and not found[-1]:
    found.pop()
  return P(*(axes[0] if len(axes) == 1 else axes or None for axes in found))


def tree(mesh: Mesh, rules: mesh_lib.Rules, boxed: PyTree) -> PyTree:
  """`NamedSharding` of every leaf of a tree of shapes boxed with logical axes.

  Vectors (norm scales, biases) and leaves without a box are replicated: gathering them would cost
  more than they take. The result has the unboxed tree's form.
  """
  sizes = dict(mesh.shape)

  def one(leaf):
    if not isinstance(leaf, nn.LogicallyPartitioned) or len(set(leaf.names) - {"blocks"}) < 2:
      return NamedSharding(mesh, P())
    return NamedSharding(mesh, spec(leaf.value.shape, leaf.names, sizes, rules))

  return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device has the whole array."""
  return NamedSharding(mesh, P())


def rows(mesh: Mesh, leading: int = 0) -> NamedSharding:
  """The axis after `leading` others is the batch's."""
  return NamedSharding(mesh, P(*[None] * leading, mesh_lib.DATA_AXES))


def batch(mesh: Mesh, like: PyTree, leading: int = 1) -> PyTree:
  """Shardings of a batch, for every leaf of `like`: split by rows after `leading` axes.

  A `language_step.LanguageBatch` has one leading axis, the micro-batches; its answer places are
  laid out by data shard, so that they are split the same way.
  """
  return jax.tree.map(lambda _: rows(mesh, leading), like)


def optimizer(
  tx: optax.GradientTransformation, state: PyTree, params: PyTree, mesh: Mesh
) -> PyTree:
  """Shardings of an optimiser's state: moments like their parameters, all else replicated.

  Args:
    tx: the transformation.
    state: its (abstract) state.
    params: shardings of the parameters.
    mesh: of the result.
  """
  return optax.tree_map_params(
    tx,
    lambda _, own: own,
    state,
    params,
    transform_non_params=lambda _: replicated(mesh),
  )


@contextlib.contextmanager
def use(mesh: Mesh | None, rules: mesh_lib.Rules = mesh_lib.DEFAULT_RULES) -> Iterator[None]:
  """Inside, traced functions hold their activations to `mesh`; its one device needs nothing."""
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
  """x, and its cotangent, held to the mesh by the names of its axes; a no-op outside `use`."""
  found = current()
  if found is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(x.shape, names, *found))


def tokens(x: Array) -> Array:
  """x [B, ...] held to the shards of its rows: what is computed a token stays with the token."""
  return constrain(x, "batch", *[None] * (x.ndim - 1))


def shard_count() -> int:
  """Data shards of the mesh in use; 1 outside `use`."""
  found = current()
  return 1 if found is None else math.prod(found[0][axis] for axis in mesh_lib.DATA_AXES)


def _own_shards(mesh: Mesh) -> tuple[tuple[int, ...], int, int]:
  """(data shards of this process, their place among all processes' sets of shards, sets)."""
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
  own = tuple(holders[jax.process_index()])
  return own, sets.index(own), len(sets)


def own_rows(mesh: Mesh) -> tuple[int, int]:
  """(index, count) of this process's share of the batch, for a Grain shard.

  Processes that hold the same rows (tensor parallelism across processes) have the same index.
  """
  return _own_shards(mesh)[1:]


def place(mesh: Mesh, tree: PyTree, leading: int = 1) -> PyTree:
  """The global batch from this process's rows, for every leaf; see `rows`.

  A process's data shards take its rows in order, wherever on the mesh they are.
  """
  own, _, count = _own_shards(mesh)
  sharding, shards = rows(mesh, leading), mesh_lib.data_shards(mesh)

  def one(leaf):
    leaf = np.asarray(leaf)
    size = leaf.shape[leading] * count // shards
    shape = (*leaf.shape[:leading], size * shards, *leaf.shape[leading + 1 :])

    def shard(index):
      first = own.index((index[leading].start or 0) // size) * size
      return leaf[(slice(None),) * leading + (slice(first, first + size),)]

    return jax.make_array_from_callback(shape, sharding, shard)

  return jax.tree.map(one, tree)


def gathered(tree: PyTree) -> Any:
  """Host copies of whole arrays, whichever process holds their shards; a collective call."""
  from jax.experimental import multihost_utils

  def one(leaf):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
      return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

  return jax.tree.map(one, tree)
