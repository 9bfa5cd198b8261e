"""What the routing gains: the loss with the trained routing weights replaced, less as trained.

A tie between a routed and a plain adapter says nothing about routing unless the routing does
something. Three replacements take it away bit by bit:

  other     the weights of another row: an example keeps a routing, but not its own
  mean      each router's mean weights over the evaluation set: one mixture for all
  uniform   1/M for every atom: no choice at all

A gain at or below zero means that the replaced weights do as well. Beside it stands how far
weights, keys and atoms moved from where they were drawn: an inert router has not moved. Letters as
in `qlora_jax/typing.py`; I counts the routers of a block, as in `routing.RoutingRecord`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import rerouting
from qlora_jax.typing import Array, PyTree

REPLACEMENTS = ("mean", "uniform", "other")
GAINS = tuple(f"routing/gain_{name}" for name in REPLACEMENTS)
MOVED = tuple(f"routing/moved_{name}" for name in ("weights", "keys", "atoms", "router"))
START = "routing/support_start"  # effective support as drawn
COLUMNS = (*GAINS, *MOVED, START)


class Probe(NamedTuple):
  """Sums over the tokens of a batch, or of several (`merge`).

  Attributes:
    trained: loss as trained; answers: how many losses it sums.
    other, own: loss with the weights of other rows, and as trained in the same rows; exchanged:
      how many losses they sum. 0 for a batch whose only row has no other.
    weights: [N, I, M], the trained weights; moved: total variation distance, 0 to 1, of the trained
      weights from those as drawn; support: effective support 1 / sum_m w_m^2 as drawn; tokens: how
      many these three sum. `moved` and `support` are means over blocks and routers.
  """

  trained: Array
  answers: Array
  other: Array
  own: Array
  exchanged: Array
  weights: Array
  moved: Array
  support: Array
  tokens: Array

  @property
  def mean_weights(self) -> Array:
    """[N, I, M], each router's mean weights."""
    return self.weights / self.tokens


def merge(probes: Sequence[Probe]) -> Probe:
  """The sums over several batches."""
  return jax.tree.map(lambda *leaves: sum(leaves), *probes)


def probe(
  model: nn.Module,
  variables: PyTree,
  initial: PyTree,
  loss: Callable[[PyTree], Array],
  other: Array,
  mask: Array,
  answers: Array | float,
  *inputs,
) -> Probe:
  """The pass over a batch that needs no mean weights yet.

  Args:
    model: with a router; variables: as trained; initial: before the first step.
    loss: the summed loss, from the model's output.
    other: int, as many as there are tokens in *batch: which token's weights each one gets.
    mask: [*batch], 1 for the tokens whose weights are averaged.
    answers: how many losses `loss` sums.
    inputs: the model's.
  """
  output = model.apply(variables, *inputs)
  weights = output.routing.weights
  drawn = model.apply(initial, *inputs).routing.weights
  flat = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])
  other = other.reshape(-1)
  swapped = flat[:, :, other].reshape(weights.shape)
  replaced = rerouting.with_weights(model, variables, swapped, *inputs)
  exchanged = jnp.any(other != jnp.arange(len(other))).astype(jnp.float32)
  trained = loss(output)

  def token_sum(values):  # [N, I, *batch], mean over blocks and routers
    return jnp.sum(jnp.mean(values, axis=(0, 1)) * mask)

  return Probe(
    trained=trained,
    answers=jnp.float32(answers),
    other=exchanged * loss(replaced),
    own=exchanged * trained,
    exchanged=exchanged * answers,
    weights=jnp.sum(weights * mask[..., None], axis=tuple(range(2, weights.ndim - 1))),
    moved=token_sum(0.5 * jnp.sum(jnp.abs(weights - drawn), axis=-1)),
    support=token_sum(1.0 / jnp.sum(jnp.square(drawn), axis=-1)),
    tokens=jnp.sum(mask),
  )


def one_mixture(
  model: nn.Module,
  variables: PyTree,
  loss: Callable[[PyTree], Array],
  mean: Array,
  *inputs,
) -> tuple[Array, Array]:
  """The summed loss with mean weights [N, I, M] per router, and with uniform ones."""
  uniform = jnp.full_like(mean, 1 / mean.shape[-1])
  return tuple(
    loss(rerouting.with_weights(model, variables, weights, *inputs)) for weights in (mean, uniform)
  )


def columns(total: Probe, mean: float, uniform: float, moved: PyTree) -> dict[str, float]:
  """`COLUMNS` from sums over the evaluation set.

  Args:
    total: the merged `Probe`.
    mean, uniform: the summed losses of `one_mixture`.
    moved: of `rerouting.movement`.
  """
  row = {
    "routing/gain_mean": (mean - total.trained) / total.answers,
    "routing/gain_uniform": (uniform - total.trained) / total.answers,
    "routing/gain_other": (total.other - total.own) / total.exchanged
    if total.exchanged
    else math.nan,
    "routing/moved_weights": total.moved / total.tokens,
    **{f"routing/moved_{name}": moved[name] for name in ("keys", "atoms", "router")},
    START: total.support / total.tokens,
  }
  return {name: float(value) for name, value in row.items()}


def other_rows(count: int, seed: int = 0) -> np.ndarray:
  """A permutation int32 [count] of rows in one cycle: no row keeps its own weights.

  Raises:
    ValueError: one row alone has no other.
  """
  if count < 2:
    raise ValueError("one row has no other row to exchange routing weights with")
  order = np.random.default_rng(seed).permutation(count)
  other = np.empty(count, np.int32)
  other[order] = np.roll(order, 1)
  return other


def other_examples(segment_ids: np.ndarray, answers: np.ndarray) -> np.ndarray:
  """For packed rows: the token int32 [B, T] of another example whose weights each token gets.

  The examples of a batch are exchanged in one cycle. Prompt tokens get the weights of prompt
  tokens, answer tokens those of answer tokens, in their order; the last one serves for the rest
  of a longer part. Padding, and a batch of a single example, keep their own.

  Args:
    segment_ids: int [B, T], from 1 in each row; 0 on padding.
    answers: [B, T], 1 where the next token is an answer's.
  """
  source = np.arange(segment_ids.size, dtype=np.int32)
  segments, mask = segment_ids.ravel(), np.asarray(answers).ravel() > 0
  rows = np.repeat(np.arange(len(segment_ids)), segment_ids.shape[1])
  examples = []
  for row, segment in dict.fromkeys(zip(rows[segments > 0], segments[segments > 0], strict=True)):
    tokens = np.flatnonzero((rows == row) & (segments == segment))
    examples.append((tokens[~mask[tokens]], tokens[mask[tokens]]))
  if len(examples) < 2:
    return source.reshape(segment_ids.shape)
  for example, other in enumerate(other_rows(len(examples))):
    every = np.sort(np.concatenate(examples[other]))
    for part, target in enumerate(examples[example]):
      given = examples[other][part]
      given = given if len(given) else every
      source[target] = given[np.minimum(np.arange(len(target)), len(given) - 1)]
  return source.reshape(segment_ids.shape)
