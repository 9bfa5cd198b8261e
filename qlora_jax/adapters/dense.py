"""The one adapter slot: a frozen linear map and the branch that corrects it.

The kernel and bias are variables of the collection `base`, the branch's weights of `params`, the
branch's frozen factors of `frozen`: three separate trees, of which only `params` is
differentiated, optimised and checkpointed. Full fine-tuning differentiates `base` instead.
"""

from collections.abc import Iterable

import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import functional, memory
from qlora_jax.adapters import routing as routing_lib
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array, Float, typed


class AdaptedDense(nn.Module):
  """y = x W + b, corrected by the adapter's branch.

  The product runs in x's dtype; the branch's weights and the corrected sum are float32.

  Attributes:
    config: the adapter.
    map_name: the name of this map in a layer, as in `map_ranks`.
    inputs, outputs: D_in and D_out.
    axes: logical axis names of the kernel.
    use_bias: whether the base has a bias.
    base_dtype: dtype in which the base is stored.
  """

  config: config_lib.AdapterConfig
  map_name: str
  inputs: int
  outputs: int
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
    branch_class = self.config.record.branch
    self.branch = branch_class and branch_class(
      self.config, self.map_name, self.inputs, self.outputs, self.axes
    )

  def low_rank_state(self, x: Float[Array, "*batch D_in"]) -> Float[Array, "*batch R"]:
    """z of this map, for the block whose anchor it is."""
    return self.branch.low_rank_state(x)

  def projection(self) -> Array | None:
    """A [D_in, R] if the branch accepts x A from `project`, else None."""
    return None if self.branch is None else self.branch.projection()

  @typed
  def __call__(
    self,
    x: Float[Array, "*batch D_in"],
    routing: routing_lib.BlockRouting | None,
    shared: memory.Shared,
    low_rank: Float[Array, "*batch R"] | None = None,
  ) -> tuple[Float[Array, "*batch D_out"], routing_lib.Routing | None]:
    """Maps x, with the branch's correction.

    Args:
      x: the input.
      routing: of the block, or None.
      shared: the network's shared parameters.
      low_rank: x A, if `project` has computed it.

    Returns:
      The output, and the routing that the branch made itself or None.
    """
    kernel = self.kernel.value
    y = jnp.einsum("...d,df->...f", x, kernel.astype(x.dtype))
    branch_routing = None
    if self.branch is not None:
      projected = {} if low_rank is None else {"low_rank": low_rank}
      y, branch_routing = self.branch(x, y, kernel, routing, shared, **projected)
    if self.use_bias:
      y = y + self.bias.value
    return y.astype(x.dtype), branch_routing


def project(
  x: Float[Array, "*batch D_in"], maps: Iterable[AdaptedDense]
) -> dict[str, Float[Array, "*batch R"]]:
  """x A by map name, for maps that read the same x: all in one product.

  Its gradient is one product too. The frozen maps' gradients of x are summed before this one's is
  added: if their outputs are split over a mesh axis, the compiler sends one sum over it for q, k
  and v.
  """
  factors = {adapted.map_name: adapted.projection() for adapted in maps}
  factors = {name: factor for name, factor in factors.items() if factor is not None}
  if not factors:
    return {}
  product = functional.project(x, jnp.concatenate(list(factors.values()), axis=1))
  ends = np.cumsum([factor.shape[1] for factor in factors.values()])
  parts = jnp.split(product, ends[:-1], axis=-1)
  return {name: sharding.tokens(part) for name, part in zip(factors, parts, strict=True)}
