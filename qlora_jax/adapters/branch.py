"""The trained branch of one adapted map: the base class of all families. The slot is `dense.py`.

A branch gets the input x, the frozen kernel and its product, and the routing of its block if there
is one. It returns the corrected product, with the routing that it made itself or None. Letters as
in `qlora_jax/typing.py`.
"""

from flax import linen as nn

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import contraction, functional, memory
from qlora_jax.adapters import routing as routing_lib
from qlora_jax.typing import Array, Float, typed

Corrected = tuple[Float[Array, "*batch D_out"], routing_lib.Routing | None]


class Branch(nn.Module):
  """What every branch knows: its adapter, and its map's name, widths and axes.

  Attributes:
    config: the adapter.
    map_name: the name of the map in a layer, as in `map_ranks`.
    inputs, outputs: D_in and D_out.
    axes: the logical axes of the map's kernel; the branch's factors are split as the map is.
  """

  config: config_lib.AdapterConfig
  map_name: str
  inputs: int
  outputs: int
  axes: tuple[str, str] = ("input", "output")

  @property
  def rank(self) -> int:
    return self.config.rank_of(self.map_name)

  @property
  def scaling(self) -> float:
    return self.config.scale_of(self.map_name)

  def factors(self) -> tuple[Array, Array]:
    """Declares `lora_a` [D_in, R] and `lora_b` [R, D_out]; the second starts at zero."""
    return self.factor_a(), self.param(
      "lora_b",
      nn.with_logical_partitioning(nn.initializers.zeros, ("rank", self.axes[1])),
      (self.rank, self.outputs),
    )

  def factor_a(self) -> Array:
    """Declares `lora_a` [D_in, R]."""
    return self.param(
      "lora_a",
      nn.with_logical_partitioning(nn.initializers.lecun_normal(), (self.axes[0], "rank")),
      (self.inputs, self.rank),
    )

  def projection(self) -> Array | None:
    """A [D_in, R] if `__call__` takes x A as a last argument, `low_rank`; see `dense.project`."""
    return None

  def __call__(
    self,
    x: Float[Array, "*batch D_in"],
    base: Float[Array, "*batch D_out"],
    kernel: Float[Array, "D_in D_out"],
    routing: routing_lib.BlockRouting | None,
    shared: memory.Shared,
  ) -> Corrected:
    """Corrects the frozen product of one map.

    Args:
      x: the map's input.
      base: x W.
      kernel: W.
      routing: of the block, for families with one router per block.
      shared: the network's shared parameters, see `memory.SharedParameters`.

    Returns:
      The corrected product, and the routing that the branch made itself or None.
    """
    raise NotImplementedError


class RoutedBranch(Branch):
  """A branch with its own router [R, M] on x A."""

  def router_kernel(self) -> Array:
    """Declares `router` [R, M]."""
    return self.param(
      "router",
      nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("rank", "atoms")),
      (self.rank, self.config.atoms),
    )

  @typed
  def route(
    self,
    state: Float[Array, "*batch R"],
    kernel: Float[Array, "R M"],
    atoms: Float[Array, "M R R2"] | None = None,
  ) -> routing_lib.Routing:
    """Weights [*batch, M]: the softmax of state times the router's kernel.

    `atoms` are those that the weights mix to an operator C, if they do; an intervention that
    replaces the weights (`rerouting.py`) builds C from them.
    """
    logits = state @ kernel
    weights = functional.sparse_weights(logits, self.config.kept_atoms)
    order = "" if atoms is None else contraction.choose(self.config, 1)
    return routing_lib.Routing(weights, logits, None, order)
