"""The loss of a language model, on answer tokens alone. Letters as in `qlora_jax/typing.py`.

Logits are made for A answer places in chunks, so that [B, T, V] never exists.
"""

from typing import NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp

from qlora_jax.adapters import losses
from qlora_jax.data.text import packing
from qlora_jax.models import decoder
from qlora_jax.parallel import sharding
from qlora_jax.training import step as step_lib
from qlora_jax.typing import Array, PyTree

CHUNK = 128  # answer places whose logits exist at once


class LanguageBatch(NamedTuple):
  """B rows of T tokens, and the A places of them whose next token is an answer's.

  Attributes:
    tokens, positions, segments: int32 [B, T].
    loss_mask: float32 [B, T]; routing penalties are taken over these tokens.
    instruction: float32 [B, T, E], or None.
    places: int32 [X, A / X] for X data shards, each of B / X rows: indices into the shard's own
      flattened [B/X T], so that no shard reads another's states.
    targets: int32 [X, A / X]; weights: float32 [X, A / X], 0 where A is rounded up.
  """

  tokens: Array
  positions: Array
  segments: Array
  loss_mask: Array
  instruction: Array | None
  places: Array
  targets: Array
  weights: Array


def from_text(
  batch: packing.TextBatch, table: np.ndarray | None, parts: int = 1, shards: int = 1
) -> LanguageBatch:
  """What the step takes: every leaf with a leading axis of `parts` micro-batches.

  A is rounded up to `shards` times CHUNK times a power of two, so that few shapes are compiled; it
  is the same in all processes.

  Args:
    batch: B rows, a multiple of `parts` times `shards`; this process's own.
    table: embeddings [instructions, E], or None.
    parts: micro-batches, run one after another.
    shards: data shards that this process's rows lie on.
  """
  length, rows = batch.tokens.shape[1], len(batch.tokens) // (parts * shards)
  masks = batch.loss_mask.reshape(parts * shards, rows * length)
  counts = batch.row_answers
  if counts is None:
    counts = np.count_nonzero(batch.loss_mask, axis=1)
  most, size = int(counts.reshape(-1, rows).sum(axis=1).max()), CHUNK
  while size < most:
    size *= 2
  places = np.zeros((parts * shards, size), np.int32)
  weights = np.zeros(places.shape, np.float32)
  for shard, mask in enumerate(masks):
    answer_places = np.flatnonzero(mask)
    places[shard, : len(answer_places)], weights[shard, : len(answer_places)] = answer_places, 1.0
  targets = np.take_along_axis(batch.targets.reshape(masks.shape), places, axis=1)
  instruction = None if table is None else table[batch.instruction_id]
  batches = LanguageBatch(
    batch.tokens,
    batch.positions,
    batch.segment_ids,
    batch.loss_mask,
    instruction,
    places,
    targets,
    weights,
  )
  return jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batches)


def answer_losses(
  model: decoder.Decoder, variables: PyTree, hidden: Array, batch: LanguageBatch
) -> Array:
  """Negative log-likelihood [X, A / X] in nats of each answer token, from hidden [B, T, D]."""
  shards, width = len(batch.places), hidden.shape[-1]
  states = sharding.tokens(hidden.reshape(shards, -1, width))
  # Gathered once, not again in each turn of the loop.
  table = model.apply(variables, hidden.dtype, method="output_table")

  @jax.checkpoint  # a chunk's logits are made again for its gradient
  def chunk(inputs):
    states, targets = inputs
    logits = model.apply(variables, states, table, method="logits")
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

  if shards == 1:  # products and their gradients without an axis of one are faster on a CPU
    chosen = states[0][batch.places[0]].reshape(-1, CHUNK, width)
    nats = jax.lax.map(chunk, (chosen, batch.targets.reshape(-1, CHUNK)))
    return nats.reshape(1, -1)

  def chunks(leaf):  # [X, A / X, ..] to [chunks, X, CHUNK, ..]
    return jnp.moveaxis(leaf.reshape(shards, -1, CHUNK, *leaf.shape[2:]), 1, 0)

  chosen = sharding.tokens(jax.vmap(lambda rows, places: rows[places])(states, batch.places))
  nats = jax.lax.map(chunk, (chunks(chosen), chunks(batch.targets)))
  return jnp.moveaxis(nats, 0, 1).reshape(shards, -1)


def loss_fn(
  params: PyTree, frozen: step_lib.Frozen, batch: LanguageBatch, model: decoder.Decoder
) -> tuple[Array, Array]:
  """Summed loss of the answer tokens, and the mean of the routing penalties."""
  variables = step_lib.variables(model, params, frozen)
  output = model.apply(variables, batch.tokens, batch.positions, batch.segments, batch.instruction)
  nats = answer_losses(model, variables, output.hidden, batch)
  penalty = losses.penalty(model.adapter, output.routing, batch.loss_mask)
  return jnp.sum(nats * batch.weights), penalty


def gradients(
  params: PyTree, frozen: step_lib.Frozen, batches: LanguageBatch, model: decoder.Decoder
) -> tuple[Array, PyTree]:
  """(Mean nats of an answer token, gradient of it plus the penalties), see `from_text`.

  Micro-batches are weighted by their answer tokens: their number does not change the loss. Each
  penalty is over a micro-batch's own tokens, and they are weighted alike.
  """
  total = jnp.maximum(jnp.sum(batches.weights), 1.0)

  def minimised(params, batch):
    nats, penalty = loss_fn(params, frozen, batch, model)
    share = jnp.sum(batch.weights) / total
    return nats / total + share * penalty, nats / total

  def body(carry, batch):
    (_, nats), grads = jax.value_and_grad(minimised, has_aux=True)(params, batch)
    return jax.tree.map(jnp.add, carry, (nats, grads)), None

  if len(batches.tokens) == 1:
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    (_, nats), grads = jax.value_and_grad(minimised, has_aux=True)(params, batch)
    return nats, grads
  zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
  return jax.lax.scan(body, zero, batches)[0]


def init_params(model: decoder.Decoder, base: PyTree, key: Array) -> tuple[PyTree, step_lib.Frozen]:
  """Draws the adapter over a given base: the trained tree, and what stays frozen."""
  dim = model.adapter.instruction_dim
  batch = step_lib.Batch(
    jnp.zeros((1, 2), jnp.int32), jnp.zeros(1), jnp.zeros((1, dim)) if dim else None
  )
  return step_lib.init_params(_Initialised(model), base, key, batch)


class _Initialised(NamedTuple):
  """A decoder as `step.init_params` calls a model: features and an instruction."""

  model: decoder.Decoder

  @property
  def adapter(self):
    return self.model.adapter

  def apply(self, variables, tokens, instruction, **options):
    return self.model.apply(variables, tokens, instruction, method="initialise", **options)
