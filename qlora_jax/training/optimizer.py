"""The optimiser: AdamW from optax over the trained tree alone, with a schedule of unit height.

The learning rate is not part of the transformation: it is an array in the train state, so that
runs that differ in it alone share one compiled step.
"""

import dataclasses

import jax
import optax

from qlora_jax import errors
from qlora_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with linear warm-up and cosine decay to zero.

  Attributes:
    steps: optimiser steps of a run.
    batch_size: examples a step.
    warmup: share of the steps spent warming up linearly.
    b1, b2, eps, weight_decay: AdamW's, the decay multiplied by the learning rate.
    clip: largest global norm of the gradient; 0 switches clipping off.
    memory_multiplier: factor on the learning rate of the shared memory.
    router_multiplier: factor on the learning rate of the routers.
  """

  steps: int = 1000
  batch_size: int = 64
  warmup: float = 0.05
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip: float = 1.0
  memory_multiplier: float = 1.0
  router_multiplier: float = 1.0

  def __post_init__(self):
    for name in ("steps", "batch_size"):
      if getattr(self, name) < 1:
        raise errors.UserError(f"optimizer.{name}: {getattr(self, name)} is not at least 1")
    if not 0 <= self.warmup < 1:
      raise errors.UserError(f"optimizer.warmup: {self.warmup} is not a share in [0, 1)")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise errors.UserError(f"optimizer.{name}: {getattr(self, name)} is not in [0, 1)")
    for name in ("eps", "weight_decay", "clip", "memory_multiplier", "router_multiplier"):
      if not 0 <= getattr(self, name) < float("inf"):
        raise errors.UserError(
          f"optimizer.{name}: {getattr(self, name)} is not a finite number of at least 0"
        )


def schedule(config: OptimizerConfig) -> optax.Schedule:
  """Step -> factor in [0, 1]: linear warm-up, then cosine decay to 0 at the last step."""
  warmup = max(1, round(config.warmup * config.steps))
  return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(config.steps, warmup + 1))


def make(config: OptimizerConfig) -> optax.GradientTransformation:
  """AdamW whose updates are still to be multiplied by the run's learning rate."""
  parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
  parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
  if config.weight_decay:
    parts.append(optax.add_decayed_weights(config.weight_decay))
  if config.memory_multiplier != 1.0 or config.router_multiplier != 1.0:
    factors = {
      "memory": config.memory_multiplier,
      "router": config.router_multiplier,
      "other": 1.0,
    }
    parts.append(
      optax.multi_transform({k: optax.scale(f) for k, f in factors.items()}, parameter_groups)
    )
  parts.append(optax.scale_by_schedule(lambda count: -schedule(config)(count)))
  return optax.chain(*parts)


def parameter_groups(params: PyTree) -> PyTree:
  """Labels each leaf 'memory', 'router' or 'other' by the names on its path."""

  def label(path, _):
    names = {getattr(key, "key", None) for key in path}
    if "memory" in names:
      return "memory"
    return "router" if any(str(name).startswith("router") for name in names) else "other"

  return jax.tree_util.tree_map_with_path(label, params)
