"""The step that training runs, with shapes for values, on a mesh of devices that need not exist."""

import dataclasses
import math

import jax
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.models import decoder
from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.parallel import sharding
from qlora_jax.training import optimizer as optimizer_lib
from qlora_jax.training import step as step_lib
from qlora_jax.typing import PyTree
from qlora_jax.workloads import language_shards, language_step


@dataclasses.dataclass(frozen=True)
class Job:
  """One step: a model with its adapter, its optimiser, its mesh and its batch.

  Attributes:
    model: the decoder and its adapter.
    optimizer: with the batch's rows.
    mesh: sizes and rules.
    length: tokens a row, all of one text.
    answers: share of the places that have a loss; 1.0 is the most a step can need.
    micro_batches: parts of the batch, one after another.
  """

  model: decoder.Decoder
  optimizer: optimizer_lib.OptimizerConfig
  mesh: mesh_lib.MeshConfig
  length: int
  answers: float = 1.0
  micro_batches: int = 1

  @property
  def rows(self) -> int:
    return self.optimizer.batch_size

  def places(self, shards: int) -> int:
    """Answer places of one micro-batch on one data shard, rounded up as training rounds them."""
    tokens = self.rows * self.length // (shards * self.micro_batches)
    size = language_step.CHUNK
    while size < self.answers * tokens:
      size *= 2
    return size


def arguments(job: Job, shards: language_shards.Shards) -> tuple[PyTree, PyTree, PyTree]:
  """(state, frozen, batch) as shapes with shardings, as training holds them."""
  model = job.model
  shapes = nn.meta.unbox(decoder.abstract(model.config, model.adapter))
  places = shards.variables(model)
  params = shapes.get("params", {})
  if model.adapter.trains_base:
    params = {**params, "base": shapes["base"]}
  opt_state = jax.eval_shape(optimizer_lib.make(job.optimizer).init, params)
  state = step_lib.TrainState(
    jax.ShapeDtypeStruct((), jnp.int32), params, opt_state, jax.ShapeDtypeStruct((), jnp.float32)
  )
  frozen = step_lib.Frozen(shapes["base"], shapes.get("frozen", {}))
  placed = step_lib.Frozen(places["base"], places.get("frozen", {}))
  return (
    _sharded(state, _full(state, shards.state(model, job.optimizer))),
    _sharded(frozen, placed),
    batch(job, shards.mesh),
  )


def batch(job: Job, mesh: jax.sharding.Mesh) -> language_step.LanguageBatch:
  """A step's inputs, with a leading axis of micro-batches."""
  shards, parts = mesh_lib.data_shards(mesh), job.micro_batches
  rows, dim = job.rows // parts, job.model.adapter.instruction_dim
  places = job.places(shards)
  split = sharding.rows(mesh, leading=1)

  def array(*shape, dtype=jnp.int32):
    return _leaf((parts, *shape), dtype, split)

  return language_step.LanguageBatch(
    array(rows, job.length),
    array(rows, job.length),
    array(rows, job.length),
    array(rows, job.length, dtype=jnp.float32),
    array(rows, job.length, dim, dtype=jnp.float32) if dim else None,
    array(shards, places),
    array(shards, places),
    array(shards, places, dtype=jnp.float32),
  )


def lower(job: Job, shards: language_shards.Shards, platform: str) -> jax.stages.Lowered:
  """Traces and lowers the very function that training calls each step."""
  step = language_shards.jitted(job.model, job.optimizer, shards)
  given = arguments(job, shards)
  with shards.use():
    return step.trace(*given).lower(lowering_platforms=(platform,))


def bytes_a_chip(tree: PyTree) -> int:
  """Bytes of a chip's own shards of a tree of shapes with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _leaf(shape, dtype, place) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _sharded(tree: PyTree, places: PyTree) -> PyTree:
  return jax.tree.map(lambda leaf, place: _leaf(leaf.shape, leaf.dtype, place), tree, places)


def _full(tree: PyTree, places: PyTree) -> PyTree:
  """A prefix of shardings, with one for every leaf of the tree."""
  return jax.tree.map(
    lambda place, part: jax.tree.map(lambda _: place, part),
    places,
    tree,
    is_leaf=lambda leaf: isinstance(leaf, jax.sharding.Sharding),
  )
