"""A trained network whose routing weights are replaced, without retraining.

Queryable LoRA (arXiv 2605.08423), steps (4)-(6). Two interventions:

  with_weights    replaces the weights w of every router: what does the trained routing gain?
  without_atoms   removes atoms from blocks: a removed atom has logit -inf in the block, so that the
                  weights of the others are the softmax over them alone. They are convex again, as
                  if the memory had never held the atom

Both act on Queryable LoRA's routers; `with_weights` also on those of Lily and CoMoL. Letters as in
`qlora_jax/typing.py`.
"""

import inspect
from collections.abc import Callable

import jax
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax import errors
from qlora_jax.adapters import block, branch, functional, registry, router
from qlora_jax.adapters import routing as routing_lib
from qlora_jax.typing import Array, PyTree

_ROUTER = inspect.signature(router.BlockRouter.__call__)
_BRANCH = inspect.signature(branch.RoutedBranch.route)

# (routing, config, block index, place among the block's routers) -> new weights [*batch, M]
Reweigh = Callable[[routing_lib.Routing, object, Array, int], Array]


def with_weights(model: nn.Module, variables: PyTree, weights: Array, *inputs, **options):
  """`model.apply(variables, *inputs, **options)` with every router's weights replaced.

  Args:
    weights: [N, I, M], one mixture per router, or [N, I, *batch, M], one per token; convex.
    inputs, options: as for the model.

  Raises:
    errors.UserError: the adapter has no router.
  """
  if not model.adapter.has_router:
    raise errors.UserError(f"adapter {model.adapter.family!r} has no routing weights to replace")

  def reweigh(routed, config, index, place):
    del config
    return jnp.broadcast_to(jnp.asarray(weights)[index, place], routed.weights.shape)

  return _apply(model, variables, reweigh, *inputs, **options)


def without_atoms(model: nn.Module, variables: PyTree, kept_atoms: Array, *inputs, **options):
  """`model.apply(variables, *inputs, **options)` with only some atoms in each block.

  Args:
    kept_atoms: bool [N, M], at least k atoms in every block.
    inputs, options: as for the model.

  Raises:
    errors.UserError: the adapter routes over no shared memory.
  """
  if not model.adapter.routed:
    raise errors.UserError(f"adapter {model.adapter.family!r} has no memory to take atoms out of")

  def reweigh(routed, config, index, place):
    del place
    logits = jnp.where(jnp.asarray(kept_atoms)[index], routed.logits, -jnp.inf)
    return functional.sparse_weights(logits, config.kept_atoms, config.weights == "equal")

  return _apply(model, variables, reweigh, *inputs, **options)


def _apply(model: nn.Module, variables: PyTree, reweigh: Reweigh, *inputs, **options):
  # Interceptors run while the model is traced, in the order of its calls: a block first, then its
  # routers one after another, as `routing.RoutingRecord` lists them.
  position = {"block": None, "router": 0}

  def intercept(call, arguments, keywords, context):
    module, method = context.module, context.method_name
    if isinstance(module, block.Block) and method == "__call__":
      carry = arguments[0]
      position.update(block=carry[3], router=0)
      return call(*arguments, **keywords)
    result = call(*arguments, **keywords)
    if isinstance(module, router.BlockRouter) and method == "__call__":
      atoms = _ROUTER.bind(None, *arguments, **keywords).arguments["shared"]["atoms"]
      needs_operator = result.operator is not None  # else the maps multiply by the weights
    elif isinstance(module, branch.RoutedBranch) and method == "route":
      atoms = _BRANCH.bind(None, *arguments, **keywords).arguments.get("atoms")
      needs_operator = atoms is not None
    else:
      return result
    weights = reweigh(result, module.config, position["block"], position["router"])
    position["router"] += 1
    operator = functional.routed_operator(weights, atoms) if needs_operator else None
    return result.replace(weights=weights, operator=operator)

  with nn.intercept_methods(intercept):
    return model.apply(variables, *inputs, **options)


def movement(initial: PyTree, params: PyTree) -> dict[str, Array]:
  """How far atoms, keys and routers moved from where they were drawn.

  Args:
    initial, params: the trained tree before the first step and now.

  Returns:
    `atoms`, `keys` and `router`: sqrt(summed squared changes / summed squared spread at the start).
    The spread of atoms and keys [.., M, ..] is about their mean over the M, because a router can
    only choose by the differences. A router's maps have no such axis: their spread is their size.
    NaN if the spread is zero (maps that start at zero) or if there is no such leaf.
  """
  change: dict[str, list] = {"atoms": [], "keys": [], "router": []}
  spread: dict[str, list] = {"atoms": [], "keys": [], "router": []}
  now = dict(jax.tree_util.tree_flatten_with_path(params)[0])
  for path, start in jax.tree_util.tree_flatten_with_path(initial)[0]:
    kind, axis = _kind([str(getattr(key, "key", "")) for key in path])
    if kind is None:
      continue
    change[kind].append(jnp.sum(jnp.square(now[path] - start)))
    centred = start if axis is None else start - jnp.mean(start, axis=axis, keepdims=True)
    spread[kind].append(jnp.sum(jnp.square(centred)))
  nan = jnp.float32(jnp.nan)
  return {
    kind: jnp.where(sum(spread[kind]) > 0, jnp.sqrt(sum(change[kind]) / sum(spread[kind])), nan)
    if change[kind]
    else nan
    for kind in change
  }


def _kind(names: list[str]) -> tuple[str | None, int | None]:
  """The kind of a leaf: 'atoms', 'keys', 'router' or None, and its axis of atoms."""
  last = names[-1]
  if last.startswith("atom_keys"):
    return "keys", -2
  if last == "atom_descriptors":
    return "keys", -2
  if registry.is_mixed(last):
    return "atoms", -3
  routers = any(name.startswith("router") for name in names)
  return ("router", None) if routers else (None, None)
