"""CoMoL (arXiv 2603.00573): a mixture of cores with a router in every map, nothing shared.

Letters as in `qlora_jax/typing.py`; the cores of a map are its M atoms.
"""

from flax import linen as nn

from qlora_jax.adapters import branch, contraction, functional, memory, registry
from qlora_jax.adapters import routing as routing_lib
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array, Float, typed


class CoMoL(branch.RoutedBranch):
  """y = x W + scaling (x A) (sum_m w_m U_m) B with the map's own cores and router on x A.

  CoMoL (arXiv 2603.00573), from its abstract: experts are cores, the router works per token in the
  low-rank space, and the cores are merged before the product. Ours: the RMSNorm before the router,
  the cores' start (as the atoms' of Queryable LoRA) and `top_k`.
  """

  @nn.compact
  @typed
  def __call__(
    self,
    x: Float[Array, "*batch D_in"],
    base: Float[Array, "*batch D_out"],
    kernel: Float[Array, "D_in D_out"],
    routing: routing_lib.BlockRouting | None,
    shared: memory.Shared,
  ) -> branch.Corrected:
    del kernel, routing, shared
    cfg = self.config
    lora_a, lora_b = self.factors()
    cores = self.param(
      "cores",
      nn.with_logical_partitioning(
        memory.atom_initializer(cfg.atom_init, cfg.atom_noise), ("atoms", "rank", "rank_out")
      ),
      (cfg.atoms, self.rank, self.rank),
    )
    router_kernel = self.router_kernel()
    low_rank = sharding.tokens(functional.project(x, lora_a))
    # The normalisation before the router is ours.
    routed = self.route(functional.rms_norm(low_rank), router_kernel, cores)
    mixed = contraction.contract(routed, low_rank, cores, cfg.kept_atoms)
    update = functional.low_rank_output(sharding.tokens(mixed), lora_b, self.scaling)
    return base + update, routed


def _map_parameters(config, rank: int, inputs: int, outputs: int) -> int:
  return rank * (inputs + outputs) + config.atoms * rank * rank + rank * config.atoms


def _map_flops(config, rank: int, inputs: int, outputs: int) -> float:
  mixed = contraction.flops(config, 1, contraction.choose(config, 1))
  return 2.0 * rank * (inputs + outputs + config.atoms) + mixed


METHODS = (
  registry.Method(
    "comol",
    (
      registry.Preset(
        "comol",
        "CoMoL",
        "#009e73",  # green (Okabe-Ito)
        "-",
        "P",
        True,
        "a routed mixture of low-rank cores in each weight matrix, nothing shared",
      ),
    ),
    CoMoL,
    _map_parameters,
    _map_flops,
    learning_rate=1e-3,
    router="map",
    # Not the cores: they start near the identity or orthogonal, and zero would erase the update.
    mixed=("cores",),
  ),
)
