"""Atoms taken out of a trained network, everywhere or in single blocks, without retraining.

Queryable LoRA (arXiv 2605.08423), steps (4)-(6): an atom that is out of a block has logit -inf
there, so that the weights of the others are the softmax over them alone: convex again, as if the
memory had never held it. Letters as in `qlora_jax/typing.py`.
"""

import inspect

from flax import linen as nn
from jax import numpy as jnp

from qlora_jax import errors
from qlora_jax.adapters import functional, router
from qlora_jax.typing import Array, PyTree

_ROUTER = inspect.signature(router.BlockRouter.__call__)


def apply(model: nn.Module, variables: PyTree, kept: Array, *inputs):
  """`model.apply(variables, *inputs)` with only the atoms that `kept` [N, M] marks in each block.

  Args:
    kept: bool, at least k atoms in every block.
    inputs: as for the model.

  Raises:
    errors.UserError: the adapter routes over no shared memory.
  """
  if not model.adapter.routed:
    raise errors.UserError(f"adapter {model.adapter.method!r} has no memory to take atoms out of")

  def reroute(call, arguments, keywords, context):
    made = call(*arguments, **keywords)
    if not isinstance(context.module, router.BlockRouter) or context.method_name != "__call__":
      return made
    config, given = context.module.config, _ROUTER.bind(None, *arguments, **keywords).arguments
    logits = jnp.where(jnp.asarray(kept)[given["index"]], made.logits, -jnp.inf)
    weights = functional.sparse_weights(logits, config.kept_atoms, config.weights == "equal")
    operator = None
    if made.operator is not None:  # otherwise the maps multiply by the weights themselves
      operator = functional.routed_operator(weights, given["shared"]["atoms"])
    return router.Routing(weights, logits, operator)

  with nn.intercept_methods(reroute):
    return model.apply(variables, *inputs)
