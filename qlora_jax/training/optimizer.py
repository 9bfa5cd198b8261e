"""The optimiser: AdamW from optax over the trained tree alone, with a schedule of unit height.

The learning rate is not part of the transformation: it is an array in the train state, so that
runs that differ in it alone share one compiled step.
"""

import dataclasses
import functools
from collections.abc import Collection

import jax
import optax

from qlora_jax import errors
from qlora_jax.adapters import registry
from qlora_jax.typing import PyTree

GROUPS = ("atoms", "memory", "router", "other")  # what `OptimizerConfig.frozen` can name

# Leaves with weight decay besides those that the families declare (`registry.Method.decayed`). With
# full fine-tuning also the matrices of the base.
DECAYED = ("instruction_input",)
DECAYED_IN_BASE = ("kernel", "embedding", "positions", "head")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with linear warm-up and cosine decay to zero.

  Attributes:
    steps: optimizer steps of a trial.
    batch_size: examples per step.
    warmup: share of the steps spent warming up linearly.
    b1, b2, eps, weight_decay: AdamW's, the decay multiplied by the learning rate; `decayed` says
      which leaves have it.
    clip: largest global norm of the gradient; 0 switches clipping off.
    memory_multiplier: factor on the learning rate of the shared memory.
    router_multiplier: factor on the learning rate of the routers.
    frozen: groups that stay as they are: 'atoms' (U alone), 'memory' (the atoms with their keys and
      descriptors), 'router' and 'other' (all that is neither: the low-rank factors). They have no
      moments, and their gradient does not count towards `clip`.
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
  frozen: tuple[str, ...] = ()

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
    for name in self.frozen:
      if name not in GROUPS:
        raise errors.UserError(
          f"optimizer.frozen: {name!r} is unknown; use any of {', '.join(GROUPS)}"
        )


def schedule(config: OptimizerConfig) -> optax.Schedule:
  """Step -> factor in [0, 1]: linear warm-up, then cosine decay to 0 at the last step."""
  warmup = max(1, round(config.warmup * config.steps))
  return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(config.steps, warmup + 1))


def make(config: OptimizerConfig) -> optax.GradientTransformation:
  """AdamW whose updates are still to be multiplied by the learning rate of the trial."""
  parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
  parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
  if config.weight_decay:
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
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
  if not config.frozen:
    return optax.chain(*parts)
  return optax.multi_transform(
    {"trained": optax.chain(*parts), "frozen": optax.set_to_zero()},
    functools.partial(trained_or_frozen, frozen=config.frozen),
  )


def decayed(params: PyTree) -> PyTree:
  """Marks each leaf with whether it has weight decay, by its name.

  Decay pulls towards zero, so that only leaves whose zero is the frozen base have it. Atoms and
  CoMoL's cores start near the identity or orthogonal and DoRA's magnitude at one: zero would erase
  the update or the map. Keys, descriptors, routers, mixtures, pseudo-queries and gates decide which
  update is made, not how large it is. Scales and biases of the base are left out too, as is usual.
  """

  def mark(path, _):
    names = [str(getattr(key, "key", key)) for key in path]
    if names[0] == "base":
      return names[-1] in DECAYED_IN_BASE
    return names[-1] in DECAYED or registry.is_decayed(names[-1])

  return jax.tree_util.tree_map_with_path(mark, params)


def parameter_groups(params: PyTree) -> PyTree:
  """Labels each leaf 'memory', 'router' or 'other' by the names on its path."""

  def label(path, _):
    names = {getattr(key, "key", None) for key in path}
    if "memory" in names:
      return "memory"
    return "router" if any(str(name).startswith("router") for name in names) else "other"

  return jax.tree_util.tree_map_with_path(label, params)


def transplant(params: PyTree, source: PyTree, groups: Collection[str]) -> PyTree:
  """`params` with the leaves of some groups, names of `GROUPS`, taken from another trial's tree.

  Raises:
    errors.UserError: an array of these groups is missing there, or has another shape.
  """
  source_leaves = dict(jax.tree_util.tree_flatten_with_path(source)[0])

  def choose(path, leaf, group):
    if not _is_in(path, group, groups):
      return leaf
    other = source_leaves.get(path)
    if other is None or other.shape != leaf.shape:
      problem = "is missing" if other is None else f"has shape {other.shape}, not {leaf.shape}"
      raise errors.UserError(
        f"{jax.tree_util.keystr(path)} of the run to take weights from {problem}"
      )
    return other

  return jax.tree_util.tree_map_with_path(choose, params, parameter_groups(params))


def _is_in(path, group: str, groups: Collection[str]) -> bool:
  # 'atoms', or with a memory per map 'atoms_NAME'.
  is_atoms = group == "memory" and str(getattr(path[-1], "key", "")).startswith("atoms")
  return group in groups or (is_atoms and "atoms" in groups)


def trained_or_frozen(params: PyTree, frozen: Collection[str]) -> PyTree:
  """Labels each leaf 'frozen' if its group is among `frozen`, names of `GROUPS`, else 'trained'."""

  def label(path, group):
    return "frozen" if _is_in(path, group, frozen) else "trained"

  return jax.tree_util.tree_map_with_path(label, parameter_groups(params))


def count_trained(params: PyTree, frozen: Collection[str] = ()) -> int:
  """Entries of the leaves whose group is not among `frozen`."""
  labels = trained_or_frozen(params, frozen)
  leaves = zip(jax.tree.leaves(params), jax.tree.leaves(labels), strict=True)
  return sum(leaf.size for leaf, label in leaves if label == "trained")
