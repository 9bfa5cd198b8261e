"""Lily (arXiv 2407.09946): A per map, experts B shared over the layers, routed on x A.

Letters as in `qlora_jax/typing.py`; the experts are the M atoms.
"""

from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import branch, functional, memory, registry
from qlora_jax.adapters import routing as routing_lib
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array, Float, typed


class Lily(branch.RoutedBranch):
  """y = x W + scaling (x A) (sum_m w_m B_m): own A and router, experts B shared over layers.

  Lily (arXiv 2407.09946) with an A per map, where the source shares A between neighbouring layers.
  The scale is alpha/R; the source's is a free number.
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
    del kernel, routing
    lora_a, router_kernel = self.factor_a(), self.router_kernel()
    low_rank = sharding.tokens(functional.project(x, lora_a))
    # Weights per token; the source's code and PEFT average them over all tokens of a call, which
    # lets an output depend on later tokens and on other rows. `top_k` is ours.
    routed = self.route(low_rank, router_kernel)
    experts = shared[f"lily_b_{self.map_name}"]
    # One [.., M R] x [M R, D] product: the weighted copies of x A against all experts at once.
    spread = jnp.einsum("...m,...r->...mr", routed.weights, low_rank)
    update = self.scaling * jnp.einsum("...mr,mrd->...d", spread, experts)
    return base + update, routed


def _experts(config, map_outputs) -> list[registry.SharedLeaf]:
  """B [M, R, D_out] per map name."""
  return [
    registry.SharedLeaf(
      f"lily_b_{name}",
      nn.initializers.zeros,
      ("atoms", "rank", axis),
      (config.atoms, config.rank, width),
    )
    for name, width, axis in map_outputs
  ]


def _map_parameters(config, rank: int, inputs: int, outputs: int) -> int:
  del outputs
  return rank * inputs + rank * config.atoms


def _map_flops(config, rank: int, inputs: int, outputs: int) -> float:
  return 2.0 * rank * (inputs + config.atoms) + 2.0 * config.atoms * rank * outputs


METHODS = (
  registry.Method(
    "lily",
    (
      registry.Preset(
        "lily",
        "Lily",
        "#009e73",  # green (Okabe-Ito)
        "--",
        "X",
        True,
        "low-rank experts shared across layers, routed by each layer",
      ),
    ),
    Lily,
    _map_parameters,
    _map_flops,
    learning_rate=1e-3,
    router="map",
    shared=_experts,
    decayed=("lora_a", "lily_b_*"),
    mixed=("lily_b*",),
  ),
)
