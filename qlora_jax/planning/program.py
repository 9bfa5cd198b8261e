"""The training step with shapes instead of values, on a mesh whose devices need not exist."""

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
    optimizer: its config, with the number of rows per batch.
    mesh: sizes and rules.
    length: T; all tokens of a row belong to one text.
    answers: share of the tokens that have a loss; 1.0 needs the most memory.
    micro_batches: number of sequential parts of the batch.
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
    """Answer places A / X of one micro-batch on one data shard, rounded up as in training."""
    tokens = self.rows * self.length // (shards * self.micro_batches)
    size = language_step.CHUNK
    while size < self.answers * tokens:
      size *= 2
    return size


def arguments(job: Job, shards: language_shards.Shards) -> tuple[PyTree, PyTree, PyTree]:
  """(state, frozen, batch) as shapes with the shardings of training."""
  model = job.model
  shapes = nn.meta.unbox(decoder.abstract(model.config, model.adapter))
  shardings = shards.variables(model)
  params = shapes.get("params", {})
  if model.adapter.trains_base:
    params = {**params, "base": shapes["base"]}
  opt_state = jax.eval_shape(optimizer_lib.make(job.optimizer).init, params)
  state = step_lib.TrainState(
    jax.ShapeDtypeStruct((), jnp.int32), params, opt_state, jax.ShapeDtypeStruct((), jnp.float32)
  )
  frozen = step_lib.Frozen(shapes["base"], shapes.get("frozen", {}))
  frozen_shardings = step_lib.Frozen(shardings["base"], shardings.get("frozen", {}))
  return (
    _sharded(state, _full(state, shards.state(model, job.optimizer))),
    _sharded(frozen, frozen_shardings),
    batch(job, shards.mesh),
  )


def batch(job: Job, mesh: jax.sharding.Mesh) -> language_step.LanguageBatch:
  """The batch of a step as shapes with shardings, with a leading axis of micro-batches."""
  shards, parts = mesh_lib.data_shards(mesh), job.micro_batches
  rows, dim = job.rows // parts, job.model.adapter.instruction_dim
  places = job.places(shards)
  by_rows = sharding.rows(mesh, leading=1)

  def array(*shape, dtype=jnp.int32):
    return _leaf((parts, *shape), dtype, by_rows)

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
  """Traces and lowers the same function that training calls each step."""
  step = language_shards.jitted(job.model, job.optimizer, shards)
  shapes = arguments(job, shards)
  with shards.use():
    return step.trace(*shapes).lower(lowering_platforms=(platform,))


def bytes_per_chip(tree: PyTree) -> int:
  """Bytes of one chip's shards, for a tree of shapes with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _leaf(shape, dtype, leaf_sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=leaf_sharding)


def _sharded(tree: PyTree, shardings: PyTree) -> PyTree:
  return jax.tree.map(
    lambda leaf, leaf_sharding: _leaf(leaf.shape, leaf.dtype, leaf_sharding), tree, shardings
  )


def _full(tree: PyTree, prefix: PyTree) -> PyTree:
  """Expands a prefix tree of shardings to one sharding per leaf of `tree`."""
  return jax.tree.map(
    lambda leaf_sharding, subtree: jax.tree.map(lambda _: leaf_sharding, subtree),
    prefix,
    tree,
    is_leaf=lambda leaf: isinstance(leaf, jax.sharding.Sharding),
  )
