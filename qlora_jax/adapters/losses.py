"""Optional penalties on the routing, masked to the tokens that count.

Weights and logits are [N, I, *batch, M], `log_prior` is [*batch, M], the mask [*batch] of 0 and 1
or None. Each function returns a scalar mean over masked tokens, blocks and routers. Letters as in
`qlora_jax/typing.py`.
"""

import jax
from jax import numpy as jnp

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import routing as routing_lib
from qlora_jax.typing import Array


def masked_mean(values: Array, mask: Array | None) -> Array:
  """Mean of values [N, I, *batch] over everything, tokens weighted by the mask [*batch]."""
  if mask is None:
    return jnp.mean(values)
  mask = jnp.broadcast_to(mask, values.shape)
  return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def kl_to_prior(weights: Array, log_prior: Array, mask: Array | None = None) -> Array:
  """KL(w || pi) = sum_m w_m (log w_m - log pi_m); atoms without weight add nothing."""
  positive = jnp.where(weights > 0, weights, 1.0)  # log 1 = 0, and no gradient through log 0
  return masked_mean(jnp.sum(weights * (jnp.log(positive) - log_prior), axis=-1), mask)


def load_balance(weights: Array, logits: Array, mask: Array | None = None) -> Array:
  """M sum_m f_m P_m of Switch Transformers (arXiv 2101.03961, eq. 4), 1 when balanced.

  f is the share of tokens whose largest weight is atom m (no gradient), P the mean softmax over
  all atoms, both per block and router.
  """
  num_atoms = weights.shape[-1]
  axes = tuple(range(2, weights.ndim - 1))
  first = jax.lax.stop_gradient(jax.nn.one_hot(jnp.argmax(weights, -1), num_atoms))
  probabilities = jax.nn.softmax(logits, axis=-1)
  if mask is None:
    share, mean = jnp.mean(first, axes), jnp.mean(probabilities, axes)
  else:
    tokens = jnp.maximum(jnp.sum(mask), 1.0)
    share = jnp.sum(first * mask[..., None], axes) / tokens
    mean = jnp.sum(probabilities * mask[..., None], axes) / tokens
  return jnp.mean(num_atoms * jnp.sum(share * mean, axis=-1))


def z_loss(logits: Array, mask: Array | None = None) -> Array:
  """Mean of logsumexp(g)^2 (ST-MoE, arXiv 2202.08906, eq. 5): keeps the logits small."""
  return masked_mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)), mask)


def penalty(
  config: config_lib.AdapterConfig,
  routing: routing_lib.RoutingRecord,
  mask: Array | None = None,
) -> Array:
  """The weighted sum of the penalties that the config switches on, a scalar."""
  total = jnp.zeros(())
  if routing.weights is None:
    return total
  if config.kl_weight:
    total += config.kl_weight * kl_to_prior(routing.weights, routing.log_prior, mask)
  if config.load_balance_weight:
    total += config.load_balance_weight * load_balance(routing.weights, routing.logits, mask)
  if config.z_loss_weight:
    total += config.z_loss_weight * z_loss(routing.logits, mask)
  return total
