"""How a router behaves, and how large its updates are. Letters as in `qlora_jax/typing.py`."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax import numpy as jnp

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import losses, memory
from qlora_jax.typing import Array, PyTree

NORM_TOKENS = 64  # tokens over which the largest measured norm is taken


def routing_statistics(weights: Array, mask: Array | None = None) -> dict[str, Array]:
  """Statistics of weights [N, I, *batch, M] over the tokens where the mask [*batch] is 1.

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
  weights: np.ndarray | None,
  map_names: Sequence[str] = (),
) -> dict[str, float] | None:
  """The certified bound on ||dW(x)||_2 next to the norms that occur.

  For every adapted map, with w on the simplex,
    ||dW(x)||_2 = scaling ||A C(x) B||_2 <= scaling ||A||_2 ||B||_2 max_m ||U_m||_2.

  Computed by NumPy, on the host: with two XLA threads, two of jaxlib's batched decompositions in
  one program deadlock (jaxlib 0.10.2).

  Args:
    config: the adapter.
    params: its parameter tree, as the model's blocks lay it out; host arrays.
    weights: [N, I, *batch, M] of Queryable LoRA, or None for plain low-rank methods.
    map_names: the maps of a layer in the order in which they run, for `operator='map'`.

  Returns:
    `certified` and `measured`: the largest over maps, blocks (and the first `NORM_TOKENS` tokens);
    `slack`: the smallest `certified - measured` over maps. NaN if parameters or weights are not
    finite. None for families whose update does not have this form.
  """
  if not config.record.certified:
    return None
  if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, weights))):
    return dict.fromkeys(("certified", "measured", "slack"), math.nan)  # a run that diverged
  blocks = params["stack"]["blocks"]
  certified, measured, slack = [], [], []
  if config.routed:
    # One small decomposition per token, block and map adds up: the first tokens stand for all.
    flat = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])[:, :, :NORM_TOKENS]
  for layer in sorted(name for name in blocks if name.startswith("layer_")):
    for name, leaves in blocks[layer].items():
      lora_a, lora_b = (np.asarray(leaves["branch"][key]) for key in ("lora_a", "lora_b"))
      scaling = config.scale_of(name)
      bound = scaling * _spectral(lora_a) * _spectral(lora_b)  # [N]
      # ||A C B|| = ||R_A C R_B^T|| for the triangular factors of A and B^T: [R, R] work only.
      right_a = np.linalg.qr(lora_a, mode="r")
      right_b = np.linalg.qr(np.swapaxes(lora_b, -1, -2), mode="r")
      if not config.routed:
        norm = scaling * _spectral(np.einsum("nar,nbr->nab", right_a, right_b))
      else:
        atoms = np.asarray(memory.of_map(config, params["stack"]["memory"], name)["atoms"])
        bound = bound * _spectral(atoms).max()
        router = map_names.index(name) if config.operator == "map" else 0
        operators = np.einsum("ntm,mrs->ntrs", flat[:, router], atoms)
        product = np.einsum("nar,ntrs,nbs->ntab", right_a, operators, right_b, optimize="optimal")
        norm = scaling * _spectral(product).max(axis=-1)
      certified.append(bound.max())
      measured.append(norm.max())
      slack.append((bound - norm).min())
  return {
    "certified": float(max(certified)),
    "measured": float(max(measured)),
    "slack": float(min(slack)),
  }


def _spectral(matrix: np.ndarray) -> np.ndarray:
  """Spectral norms of matrices [*batch, a, b]; NaN where one overflowed: LAPACK refuses it."""
  finite = np.isfinite(matrix).all(axis=(-2, -1))
  norms = np.linalg.norm(np.where(finite[..., None, None], matrix, 0.0), ord=2, axis=(-2, -1))
  return np.where(finite, norms, np.nan)


def share_by_group(weights: Array, group: Array, num_groups: int) -> Array:
  """Mean weights [num_groups, N, M] of the tokens of each group; weights [N, I, B, M]."""
  one_hot = jax.nn.one_hot(group, num_groups)  # [B, num_groups]
  total = jnp.einsum("nibm,by->ynm", weights, one_hot) / weights.shape[1]
  return total / jnp.maximum(jnp.sum(one_hot, axis=0), 1.0)[:, None, None]
