"""How a router behaves, and how large its updates are. Letters as in `qlora_jax/typing.py`."""

from collections.abc import Sequence

import jax
from jax import numpy as jnp

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import losses, memory
from qlora_jax.typing import Array, PyTree

NORM_TOKENS = 64  # tokens over which the largest measured norm is taken


def routing_statistics(weights: Array, mask: Array | None = None) -> dict[str, Array]:
  """Statistics of weights [N, G, *batch, M] over the tokens where the mask [*batch] is 1.

  Returns:
    `effective_support` 1/sum w^2 (1 when collapsed, M when uniform) and `entropy` in nats, both
    scalars averaged over tokens; `share` [N, M], the mean weight of each atom in each block;
    `max_share`, the largest share of an atom over the whole network.
  """
  positive = jnp.where(weights > 0, weights, 1.0)
  tokens = tuple(range(2, weights.ndim - 1))
  if mask is None:
    per_router = jnp.mean(weights, tokens)
  else:
    total = jnp.maximum(jnp.sum(mask), 1.0)
    per_router = jnp.sum(weights * mask[..., None], tokens) / total
  share = jnp.mean(per_router, axis=1)
  return {
    "effective_support": losses.masked_mean(1.0 / jnp.sum(jnp.square(weights), -1), mask),
    "entropy": losses.masked_mean(-jnp.sum(weights * jnp.log(positive), -1), mask),
    "share": share,
    "max_share": jnp.max(jnp.mean(share, axis=0)),
  }


def update_norms(
  config: config_lib.AdapterConfig,
  params: PyTree,
  weights: Array | None,
  map_names: Sequence[str] = (),
) -> dict[str, Array] | None:
  """The certified bound on ||dW(x)||_2 next to the norms that occur.

  For every adapted map, with w on the simplex,
    ||dW(x)||_2 = scaling ||A C(x) B||_2 <= scaling ||A||_2 ||B||_2 max_m ||U_m||_2.

  Args:
    config: the adapter.
    params: its parameter tree, as the model's blocks lay it out.
    weights: [N, G, *batch, M] of Queryable LoRA, or None for plain low-rank methods.
    map_names: the maps of a layer in the order in which they run, for `operator='map'`.

  Returns:
    `certified` and `measured`, each the largest over maps, blocks (and tokens), and `slack`, the
    least `certified - measured` of a map; None for methods whose update is not of this form.
  """
  if config.method not in ("lora", "rslora", "queryable"):
    return None
  blocks = params["stack"]["blocks"]
  certified, measured, slack = [], [], []
  if config.routed:
    # One small decomposition a token, block and map adds up: the first tokens stand for all.
    flat = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])[:, :, :NORM_TOKENS]
  for layer in sorted(name for name in blocks if name.startswith("layer_")):
    for name, leaves in blocks[layer].items():
      lora_a, lora_b = leaves["branch"]["lora_a"], leaves["branch"]["lora_b"]  # [N, D, R], ...
      scaling = config.scale_of(name)
      bound = scaling * _spectral(lora_a) * _spectral(lora_b)  # [N]
      # ||A C B|| = ||R_A C R_B^T|| for the triangular factors of A and B^T: [R, R] work only.
      right_a = jnp.linalg.qr(lora_a, mode="r")
      right_b = jnp.linalg.qr(jnp.swapaxes(lora_b, -1, -2), mode="r")
      if not config.routed:
        norm = scaling * _spectral(jnp.einsum("nqr,nsr->nqs", right_a, right_b))
      else:
        atoms = memory.of_map(config, params["stack"]["memory"], name)["atoms"]
        bound = bound * jnp.max(jnp.linalg.norm(atoms, ord=2, axis=(-2, -1)))
        router = map_names.index(name) if config.operator == "map" else 0
        own = jnp.einsum("ntm,mrs->ntrs", flat[:, router], atoms)
        product = jnp.einsum("nqr,ntrs,nps->ntqp", right_a, own, right_b)
        norm = jnp.max(scaling * _spectral(product), axis=-1)
      certified.append(jnp.max(bound))
      measured.append(jnp.max(norm))
      slack.append(jnp.min(bound - norm))
  return {
    "certified": jnp.max(jnp.stack(certified)),
    "measured": jnp.max(jnp.stack(measured)),
    "slack": jnp.min(jnp.stack(slack)),
  }


def _spectral(matrix: Array) -> Array:
  return jnp.linalg.norm(matrix, ord=2, axis=(-2, -1))


def share_by_group(weights: Array, group: Array, num_groups: int) -> Array:
  """Mean weights [num_groups, N, M] of the tokens of each group; weights [N, G, B, M]."""
  one_hot = jax.nn.one_hot(group, num_groups)  # [B, groups]
  total = jnp.einsum("ngbm,bc->cnm", weights, one_hot) / weights.shape[1]
  return total / jnp.maximum(jnp.sum(one_hot, axis=0), 1.0)[:, None, None]
