"""The train state and the pure train step. Letters as in `qlora_jax/typing.py`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import numpy as np
import optax
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import losses
from qlora_jax.typing import Array, PyTree


@flax.struct.dataclass
class TrainState:
  """What a trial carries from step to step: trained weights only, never the frozen base.

  Attributes:
    step: int32 [].
    params: the trained tree (the base for full fine-tuning, else the adapter).
    opt_state: optax's.
    learning_rate: float32 [], the height of the schedule.
  """

  step: Array
  params: PyTree
  opt_state: PyTree
  learning_rate: Array


class Batch(NamedTuple):
  """features [B, d], targets [B], instruction [B, E]; all float32."""

  features: Array
  targets: Array
  instruction: Array


def stack(batches: Sequence[Batch]) -> Batch:
  """Batches of one shape as one with a leading axis."""
  return Batch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))


class Frozen(NamedTuple):
  """Trees that no gradient reaches: the base, and the factors that an adapter froze."""

  base: PyTree
  factors: PyTree


def variables(model: nn.Module, params: PyTree, frozen: Frozen) -> PyTree:
  """The model's variable collections; full fine-tuning trains the collection `base` itself."""
  if model.adapter.trains_base:
    adapter = dict(params)
    return {"base": adapter.pop("base"), "params": adapter}
  return {"params": params, "base": frozen.base, "frozen": frozen.factors}


def init_params(model: nn.Module, base: PyTree, key: Array, batch: Batch) -> tuple[PyTree, Frozen]:
  """Draws the adapter over a given base: the trained tree, and what stays frozen."""
  _, drawn = model.apply(
    {"base": base},
    batch.features,
    batch.instruction,
    mutable=["params", "frozen"],
    rngs={"params": key},
  )
  drawn = nn.meta.unbox(drawn)
  params = drawn.get("params", {})
  if model.adapter.trains_base:
    params = {**params, "base": base}
  return params, Frozen(base, drawn.get("frozen", {}))


def loss_fn(params: PyTree, frozen: Frozen, batch: Batch, model: nn.Module):
  """Mean squared error plus the routing penalties; returns (loss, mean squared error)."""
  prediction = model.apply(variables(model, params, frozen), batch.features, batch.instruction)
  error = jnp.mean(jnp.square(prediction.values - batch.targets))
  return error + losses.penalty(model.adapter, prediction.routing), error


def gradients(params: PyTree, frozen: Frozen, batch: Batch, model: nn.Module):
  """(Mean squared error, gradient of the loss) in the trained tree alone."""
  (_, error), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, frozen, batch, model)
  return error, grads


def train_step(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  model: nn.Module,
  tx: optax.GradientTransformation,
  gradients: Callable[..., tuple[Array, PyTree]] = gradients,
) -> tuple[TrainState, dict[str, Array]]:
  """One optimizer step; `gradients(params, frozen, batch, model)` gives (loss to report, tree)."""
  error, grads = gradients(state.params, frozen, batch, model)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  updates = jax.tree.map(lambda update: state.learning_rate * update, updates)
  metrics = {"train/loss": error, "train/grad_norm": optax.global_norm(grads)}
  return (
    TrainState(
      state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.learning_rate
    ),
    metrics,
  )


def train_steps(
  state: TrainState,
  frozen: Frozen,
  batches: Batch,
  model: nn.Module,
  tx: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Array]]:
  """Scans `train_step` over batches with a leading axis [K]; metrics are means over the K steps."""

  def body(state, batch):
    return train_step(state, frozen, batch, model, tx)

  state, metrics = jax.lax.scan(body, state, batches)
  return state, jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics)
