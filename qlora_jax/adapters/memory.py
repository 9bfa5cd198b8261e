"""Parameters that the whole network shares: the memory of atoms, and Lily's experts.

The model declares this module once and hands its arrays into the scan over blocks as broadcast
inputs. A shared module instance captured by a scan with stacked parameters would be silently
untied: every block would own a copy. Letters as in `qlora_jax/typing.py`.
"""

import jax
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import functional
from qlora_jax.typing import Array

Shared = dict  # 'atoms' [M, R, R], 'atom_keys' [M, Q], 'descriptors' [M, P], 'lily_b_*' [M, R, D]
# With `memory='map'` each name of map has its own: 'atoms_NAME' and 'atom_keys_NAME'.


def atom_initializer(kind: str, noise: float):
  """U [M, R, R]: I + eps G (ours), orthogonal, or Gaussian of variance 1/R.

  With I + eps G and B = 0 training starts as plain LoRA (C = I up to eps) and no gradient is
  lost to a random core; eps parts the atoms.
  """

  def identity(key, shape, dtype=jnp.float32):
    return jnp.eye(shape[-1], dtype=dtype) + noise * jax.random.normal(key, shape, dtype)

  if kind == "identity":
    return identity
  if kind == "orthogonal":

    def orthogonal(key, shape, dtype=jnp.float32):
      make = nn.initializers.orthogonal()
      return jax.vmap(lambda k: make(k, shape[1:], dtype))(jax.random.split(key, shape[0]))

    return orthogonal
  return nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-2, batch_axis=(0,))


class SharedParameters(nn.Module):
  """Declares what an adapter shares over the whole network; `()` where it shares nothing.

  Attributes:
    config: the adapter.
    map_outputs: (map name, D_out, its logical axis) of every adapted map of a layer.
  """

  config: config_lib.AdapterConfig
  map_outputs: tuple[tuple[str, int, str], ...]

  @nn.compact
  def __call__(self) -> Shared:
    cfg, shared = self.config, {}
    own = [f"_{name}" for name, *_ in self.map_outputs] if cfg.memory == "map" else [""]
    for suffix in own if cfg.routed else ():
      shared[f"atoms{suffix}"] = self.param(
        f"atoms{suffix}",
        nn.with_logical_partitioning(
          atom_initializer(cfg.atom_init, cfg.atom_noise), ("atoms", "rank", "rank_out")
        ),
        (cfg.atoms, cfg.rank, cfg.rank),
      )
      if cfg.uses_query:
        shared[f"atom_keys{suffix}"] = self.param(
          f"atom_keys{suffix}",
          nn.with_logical_partitioning(nn.initializers.normal(1.0), ("atoms", "query")),
          (cfg.atoms, cfg.query_dim),
        )
    if cfg.uses_prior:
      width = cfg.prior_dim or cfg.instruction_dim
      shared["descriptors"] = self.param(
        "atom_descriptors",
        nn.with_logical_partitioning(nn.initializers.normal(width**-0.5), ("atoms", "prior")),
        (cfg.atoms, width),
      )
      if cfg.prior_dim:
        shared["prior_projection"] = self.param(
          "prior_projection",
          nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("instruction", "prior")),
          (cfg.instruction_dim, cfg.prior_dim),
        )
    if cfg.method == "lily":
      for name, width, axis in self.map_outputs:
        shared[f"lily_b_{name}"] = self.param(
          f"lily_b_{name}",
          nn.with_logical_partitioning(nn.initializers.zeros, ("atoms", "rank", axis)),
          (cfg.atoms, cfg.rank, width),
        )
    return shared


def of_map(config: config_lib.AdapterConfig, shared: Shared, map_name: str) -> Shared:
  """What the maps of one name see: with `memory='map'` their own 'atoms' and 'atom_keys'."""
  if config.memory != "map":
    return shared
  own = {key: shared.get(f"{key}_{map_name}") for key in ("atoms", "atom_keys")}
  return shared | {key: value for key, value in own.items() if value is not None}


def log_prior(
  config: config_lib.AdapterConfig, shared: Shared, instruction: Array | None
) -> Array | None:
  """log pi(e) [*batch, M] for the whole network, or None where the prior is off."""
  if not config.uses_prior:
    return None
  return functional.log_language_prior(
    instruction, shared.get("prior_projection"), shared["descriptors"], config.prior_temperature
  )
