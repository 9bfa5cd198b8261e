"""The trained branch of one adapted map, one module a family; the slot is in `dense.py`.

A branch gets the input x, the frozen kernel and its product, the routing of its block if there is
one, and returns the product corrected, with the routing weights it computed itself (Lily, CoMoL) or
None. Letters as in `qlora_jax/typing.py`; E stands for Lily's experts where it is an axis of a
weight.
"""

import jax
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import contraction, functional, memory, router
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array


class Branch(nn.Module):
  """What every branch knows: its adapter, its map's name and widths, and the block's maps.

  `axes` are the logical axes of the map's kernel: the branch's factors are split as the map is.
  """

  config: config_lib.AdapterConfig
  name_of_map: str
  inputs: int
  outputs: int
  maps: int
  axes: tuple[str, str] = ("input", "output")

  @property
  def rank(self) -> int:
    return self.config.rank_of(self.name_of_map)

  @property
  def scaling(self) -> float:
    return self.config.scale_of(self.name_of_map)

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


class LoRA(Branch):
  """y = x W + scaling (x A) C B; C is the block's routed operator, or absent for plain LoRA."""

  def setup(self):
    self.lora_a, self.lora_b = self.factors()

  def low_rank(self, x: Array) -> Array:
    """x A [*batch, R]."""
    # Where the map's input is split over `tensor`, x A is summed over it here, R numbers a token,
    # with or without routing; all that follows is the token's own.
    return sharding.tokens(functional.project(x, self.lora_a))

  def low_rank_state(self, x: Array) -> Array:
    """z [*batch, R] of this map, step (1), at an input that it does not map."""
    return functional.rms_norm(self.low_rank(x))

  def __call__(
    self,
    x: Array,
    base: Array,
    kernel: Array,
    block: router.BlockRouting | None,
    shared: memory.Shared,
    low_rank: Array | None = None,
  ):
    del kernel
    low_rank = product = self.low_rank(x) if low_rank is None else low_rank
    if block is not None:
      # The anchor's state is of the same product: one gradient of x, not two.
      routing = block.at(self.name_of_map, lambda: functional.rms_norm(product))
      low_rank = sharding.tokens(
        contraction.contract(
          self.config,
          self.maps,
          low_rank,
          routing.weights,
          routing.operator,
          memory.of_map(self.config, shared, self.name_of_map)["atoms"],
        )
      )
    return base + functional.low_rank_output(low_rank, self.lora_b, self.scaling), None


class DoRA(Branch):
  """y = g * ||W||_col * x (W + scaling A B) / ||W + scaling A B||_col.

  DoRA (arXiv 2402.09353), equation (5). The magnitude is stored relative to ||W||_col (g = 1 at the
  start), so that it needs no copy of the base; the source's is absolute. The norm takes no
  gradient, as in the source's section 4.3.
  """

  @nn.compact
  def __call__(self, x, base, kernel, routing, shared):
    lora_a, lora_b = self.factors()
    magnitude = self.param(
      "magnitude",
      nn.with_logical_partitioning(nn.initializers.ones, self.axes[1:]),
      (self.outputs,),
    )
    updated = kernel + self.scaling * lora_a @ lora_b
    norm = jax.lax.stop_gradient(jnp.linalg.norm(updated, axis=0))
    ratio = magnitude * jnp.linalg.norm(kernel, axis=0) / norm
    low_rank = sharding.tokens(functional.project(x, lora_a))
    return ratio * (base + functional.low_rank_output(low_rank, lora_b, self.scaling)), None


class LoRAXS(Branch):
  """y = x W + scaling x (U_R S_R) core V_R^T with U S V^T = svd(W); only the core is trained.

  LoRA-XS (arXiv 2405.17604): A = U_R S_R, B = V_R^T and one trained matrix between them. The core
  starts at zero, not at the source's Gaussian of deviation 1e-5, so that the network starts as its
  base exactly.
  """

  @nn.compact
  def __call__(self, x, base, kernel, routing, shared):
    rank = self.rank

    def factors():
      left, values, right = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
      return left[:, :rank] * values[:rank], right[:rank]

    def boxed(value, *names):
      return nn.with_logical_partitioning(lambda: value, names)()

    lora_a = self.variable("frozen", "lora_a", lambda: boxed(factors()[0], self.axes[0], "rank"))
    lora_b = self.variable("frozen", "lora_b", lambda: boxed(factors()[1], "rank", self.axes[1]))
    lora_a, lora_b = lora_a.value, lora_b.value
    core = self.param(
      "core",
      nn.with_logical_partitioning(nn.initializers.zeros, ("rank", "rank_out")),
      (rank, rank),
    )
    low_rank = sharding.tokens(jnp.einsum("...d,dr,rs->...s", x, lora_a, core))
    return base + functional.low_rank_output(low_rank, lora_b, self.scaling), None


class RoutedBranch(Branch):
  """A branch with a router of its map's own, [R, M], on x A."""

  def router_kernel(self) -> Array:
    """Declares `router` [R, M]."""
    return self.param(
      "router",
      nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("rank", "atoms")),
      (self.rank, self.config.atoms),
    )

  def route(self, state: Array, kernel: Array, atoms: Array | None = None) -> router.Routing:
    """Weights [*batch, M] over the softmax of state [*batch, R] times the router's kernel.

    `atoms` [M, R, R] are those that the weights mix, where they do; an intervention that replaces
    the weights (`rerouting.py`) builds the operator C from them.
    """
    del atoms
    logits = state @ kernel
    return router.Routing(functional.sparse_weights(logits, self.config.kept_atoms), logits, None)


class CoMoL(RoutedBranch):
  """y = x W + scaling (x A) (sum_m w_m U_m) B with the map's own cores and router on x A.

  CoMoL (arXiv 2603.00573), from its abstract: experts are cores, the router works per token in the
  low-rank space, and the cores are merged before the product. Ours: the RMSNorm before the router,
  the cores' start (as the atoms' of Queryable LoRA) and `top_k`.
  """

  @nn.compact
  def __call__(self, x, base, kernel, routing, shared):
    cfg = self.config
    lora_a, lora_b = self.factors()
    cores = self.param(
      "cores",
      nn.with_logical_partitioning(
        memory.atom_initializer(cfg.atom_init, cfg.atom_noise), ("atoms", "rank", "rank_out")
      ),
      (cfg.atoms, self.rank, self.rank),
    )
    kernel_of_router = self.router_kernel()
    low_rank = sharding.tokens(functional.project(x, lora_a))
    # The normalisation before the router is ours.
    made = self.route(functional.rms_norm(low_rank), kernel_of_router, cores)
    mixed = contraction.contract(cfg, 1, low_rank, made.weights, made.operator, cores)
    update = functional.low_rank_output(sharding.tokens(mixed), lora_b, self.scaling)
    return base + update, made


class Lily(RoutedBranch):
  """y = x W + scaling (x A) (sum_e w_e B_e): own A and router, experts B shared over layers.

  Lily (arXiv 2407.09946) with an A per map, where the source shares A between neighbouring layers;
  the scale is alpha/R, the source's a number by itself.
  """

  @nn.compact
  def __call__(self, x, base, kernel, routing, shared):
    lora_a, kernel_of_router = self.factor_a(), self.router_kernel()
    low_rank = sharding.tokens(functional.project(x, lora_a))
    # Weights per token; the source's code and PEFT average them over all tokens of a call, which
    # lets an output depend on later tokens and on other rows. `top_k` is ours.
    made = self.route(low_rank, kernel_of_router)
    experts = shared[f"lily_b_{self.name_of_map}"]
    # One [.., E R] x [E R, D] product: the weighted copies of x A against all experts at once.
    spread = jnp.einsum("...e,...r->...er", made.weights, low_rank)
    update = self.scaling * jnp.einsum("...er,erd->...d", spread, experts)
    return base + update, made


BRANCHES = {
  "lora": LoRA,
  "rslora": LoRA,
  "dora": DoRA,
  "lora_xs": LoRAXS,
  "comol": CoMoL,
  "lily": Lily,
  "queryable": LoRA,
}
