"""What the routing of a language model gains, in nats per answer token, over packed batches.

The measurement is that of `workloads/routing_gain.py`; here are its two passes over text on a mesh.
Letters as in `qlora_jax/typing.py`.
"""

import functools
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax import numpy as jnp

from qlora_jax.adapters import rerouting
from qlora_jax.data.text import packing
from qlora_jax.models import decoder
from qlora_jax.training import step as step_lib
from qlora_jax.typing import PyTree
from qlora_jax.workloads import language_shards, language_step, routing_gain


def gain(
  model: decoder.Decoder,
  shards: language_shards.Shards,
  table: np.ndarray | None,
  texts: Iterable[packing.TextBatch],
  params: PyTree,
  initial: PyTree,
  frozen: step_lib.Frozen,
  check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
  """`workloads.routing_gain.COLUMNS` over some text.

  Args:
    model: with a router.
    shards: of its mesh.
    table: embeddings [instructions, E], or None.
    texts: batches that all processes have whole.
    params, initial: the trained tree now and before the first step.
    frozen: what both share.
    check: called before each batch; it may raise to stop.
  """
  trained, drawn = (step_lib.variables(model, tree, frozen) for tree in (params, initial))
  batches, probes = [], []
  for text in texts:
    check()
    batch = shards.batch(shards.share(text), table)
    other = routing_gain.other_examples(text.segment_ids, text.loss_mask)
    with shards.use():
      probes.append(jax.device_get(_probe(model, trained, drawn, batch, other)))
    batches.append(batch)
  total, mixtures = routing_gain.merge(probes), np.zeros(2)
  for batch in batches:
    check()
    with shards.use():
      mixtures += jax.device_get(_one_mixture(model, trained, batch, total.mean_weights))
  return routing_gain.columns(total, *mixtures, jax.device_get(_movement(initial, params)))


def _nats_of(model, variables, batch):
  """The loss that `workloads.routing_gain` asks for: summed nats of a batch's answer tokens."""

  def loss(output):
    nats = language_step.answer_losses(model, variables, output.hidden, batch)
    return jnp.sum(nats * batch.weights)

  return loss


def _inputs(batch):
  return batch.tokens, batch.positions, batch.segments, batch.instruction


@functools.partial(jax.jit, static_argnums=0)
def _probe(model, variables, initial, batches: language_step.LanguageBatch, other):
  batch = jax.tree.map(lambda leaf: leaf[0], batches)
  mask = (batch.segments > 0).astype(jnp.float32)
  loss, answers = _nats_of(model, variables, batch), jnp.sum(batch.weights)
  return routing_gain.probe(model, variables, initial, loss, other, mask, answers, *_inputs(batch))


@functools.partial(jax.jit, static_argnums=0)
def _one_mixture(model, variables, batches: language_step.LanguageBatch, mean):
  batch = jax.tree.map(lambda leaf: leaf[0], batches)
  return routing_gain.one_mixture(
    model, variables, _nats_of(model, variables, batch), mean, *_inputs(batch)
  )


_movement = jax.jit(rerouting.movement)
