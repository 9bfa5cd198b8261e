"""The one adapter slot: a frozen linear map and the branch that corrects it.

The kernel and bias are variables of the collection `base`, the branch's weights of `params`, the
branch's frozen factors of `frozen`: three separate trees, of which only `params` is
differentiated, optimised and checkpointed. Full fine-tuning differentiates `base` instead.
"""

from collections.abc import Iterable

import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import branches, functional, memory, router
from qlora_jax.adapters import config as config_lib
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array


class AdaptedDense(nn.Module):
  """y = x W + b, corrected by the adapter's branch.

  The product runs in x's dtype; the branch's weights and the corrected sum are float32.

  Attributes:
    config: the adapter.
    map_name: the name of this map in a layer, as in `map_ranks`.
    inputs, outputs: D_in and D_out.
    maps: adapted maps in the block.
    axes: logical axis names of the kernel.
    use_bias: whether the base has a bias.
    base_dtype: dtype in which the base is stored.
  """

  config: config_lib.AdapterConfig
  map_name: str
  inputs: int
  outputs: int
  maps: int
  axes: tuple[str, str] = ("input", "output")
  use_bias: bool = True
  base_dtype: str = "float32"

  def setup(self):
    kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), self.axes)
    bias = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
    dtype = jnp.dtype(self.base_dtype)
    self.kernel = self.variable(
      "base", "kernel", lambda: kernel(self.make_rng("params"), (self.inputs, self.outputs), dtype)
    )
    if self.use_bias:
      self.bias = self.variable("base", "bias", lambda: bias(None, (self.outputs,), dtype))
    branch = branches.BRANCHES.get(self.config.method)
    self.branch = branch and branch(
      self.config, self.map_name, self.inputs, self.outputs, self.maps, self.axes
    )

  def low_rank_state(self, x: Array) -> Array:
    """z [*batch, R] of this map, for the block whose anchor it is."""
    return self.branch.low_rank_state(x)

  def factor_a(self) -> Array | None:
    """A [D_in, R], where the branch takes x A as it is; else None."""
    return self.branch.lora_a if isinstance(self.branch, branches.LoRA) else None

  def __call__(
    self,
    x: Array,
    routing: router.BlockRouting | None,
    shared: memory.Shared,
    low_rank: Array | None = None,
  ) -> tuple[Array, router.Routing | None]:
    """Maps x [*batch, D_in] to ([*batch, D_out], the branch's own routing or None).

    `low_rank` is x A where `project` has made it.
    """
    kernel = self.kernel.value
    y = jnp.einsum("...d,df->...f", x, kernel.astype(x.dtype))
    own = None
    if self.branch is not None:
      given = {} if low_rank is None else {"low_rank": low_rank}
      y, own = self.branch(x, y, kernel, routing, shared, **given)
    if self.use_bias:
      y = y + self.bias.value
    return y.astype(x.dtype), own


def project(x: Array, maps: Iterable[AdaptedDense]) -> dict[str, Array]:
  """x A [*batch, R] by name of map, for the maps that read the same x: all in one product.

  Its gradient is one product too. And the gradients of x that the frozen maps give meet in one sum
  before this one's is added: where their outputs are split over a mesh axis, the compiler sends the
  sum of these partial sums over it, once for q, k and v.
  """
  factors = {each.map_name: each.factor_a() for each in maps}
  factors = {name: factor for name, factor in factors.items() if factor is not None}
  if not factors:
    return {}
  product = functional.project(x, jnp.concatenate(list(factors.values()), axis=1))
  ends = np.cumsum([factor.shape[1] for factor in factors.values()])
  parts = jnp.split(product, ends[:-1], axis=-1)
  return {name: sharding.tokens(part) for name, part in zip(factors, parts, strict=True)}
