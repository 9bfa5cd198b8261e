"""Parameters that the whole network shares: the memory of atoms, Lily's experts.

The model declares this module once and passes its arrays to the scan over blocks as broadcast
inputs. A scan with stacked parameters would silently untie a shared module instance that it
captures: every block would own a copy. Letters as in `qlora_jax/typing.py`.
"""

import jax
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import functional
from qlora_jax.typing import Array

# By name: 'atoms' [M, R, R], 'atom_keys' [M, Q], 'atom_descriptors' [M, P], 'lily_b_*' [M, R, D].
# With `memory='map'` there is one set per map name: 'atoms_NAME' and 'atom_keys_NAME'.
Shared = dict


def atom_initializer(kind: str, noise: float):
  """U [M, R, R]: I + eps G (ours), orthogonal, or Gaussian of variance 1/R.

  With I + eps G and B = 0 training starts as plain LoRA (C = I up to eps) and no gradient is lost
  to a random core; eps makes the atoms differ.
  """

  def identity(key, shape, dtype=jnp.float32):
    return jnp.eye(shape[-1], dtype=dtype) + noise * jax.random.normal(key, shape, dtype)

  if kind == "identity":
    return identity
  if kind == "orthogonal":

    def orthogonal(key, shape, dtype=jnp.float32):
      draw = nn.initializers.orthogonal()
      return jax.vmap(lambda k: draw(k, shape[1:], dtype))(jax.random.split(key, shape[0]))

    return orthogonal
  return nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-2, batch_axis=(0,))


class SharedParameters(nn.Module):
  """Declares the shared parameters of the adapter's family, if it has any.

  Attributes:
    config: the adapter.
    map_outputs: (map name, D_out, its logical axis) of every adapted map of a layer.
  """

  config: config_lib.AdapterConfig
  map_outputs: tuple[tuple[str, int, str], ...]

  @nn.compact
  def __call__(self) -> Shared:
    family = self.config.record
    leaves = family.shared(self.config, self.map_outputs) if family.shared else ()
    return {
      leaf.name: self.param(
        leaf.name, nn.with_logical_partitioning(leaf.initializer, leaf.axes), leaf.shape
      )
      for leaf in leaves
    }


def of_map(config: config_lib.AdapterConfig, shared: Shared, map_name: str) -> Shared:
  """What the maps of one name read: with `memory='map'` the 'atoms' and 'atom_keys' of the name."""
  if config.memory != "map":
    return shared
  leaves = {key: shared.get(f"{key}_{map_name}") for key in ("atoms", "atom_keys")}
  return shared | {key: value for key, value in leaves.items() if value is not None}


def log_prior(
  config: config_lib.AdapterConfig, shared: Shared, instruction: Array | None
) -> Array | None:
  """log pi(e) [*batch, M] for the whole network, or None where the prior is off."""
  if not config.uses_prior:
    return None
  return functional.log_language_prior(
    instruction,
    shared.get("prior_projection"),
    shared["atom_descriptors"],
    config.prior_temperature,
  )
