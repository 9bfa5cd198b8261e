"""LoRA-XS (arXiv 2405.17604): frozen A and B from the SVD of W, and a trained core.

Letters as in `qlora_jax/typing.py`.
"""

from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import branch, functional, memory, registry
from qlora_jax.adapters import routing as routing_lib
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array, Float, typed


class LoRAXS(branch.Branch):
  """y = x W + scaling x (U_R S_R) core V_R^T with U S V^T = svd(W); only the core is trained.

  LoRA-XS (arXiv 2405.17604): A = U_R S_R, B = V_R^T and one trained matrix between them. The core
  starts at zero, not at the source's Gaussian of deviation 1e-5, so that the network starts as its
  base exactly.
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
    del routing, shared
    rank = self.rank

    def factors():
      left, values, right = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
      return left[:, :rank] * values[:rank], right[:rank]

    def boxed(value, *names):
      return nn.with_logical_partitioning(lambda: value, names)()

    lora_a = self.variable("frozen", "lora_a", lambda: boxed(factors()[0], self.axes[0], "rank"))
    lora_b = self.variable("frozen", "lora_b", lambda: boxed(factors()[1], "rank", self.axes[1]))
    core = self.param(
      "core",
      nn.with_logical_partitioning(nn.initializers.zeros, ("rank", "rank_out")),
      (rank, rank),
    )
    low_rank = sharding.tokens(jnp.einsum("...d,dr,rs->...s", x, lora_a.value, core))
    return base + functional.low_rank_output(low_rank, lora_b.value, self.scaling), None


def _map_parameters(config, rank: int, inputs: int, outputs: int) -> int:
  del config, inputs, outputs
  return rank * rank


def _map_flops(config, rank: int, inputs: int, outputs: int) -> float:
  del config
  return 2.0 * rank * (inputs + outputs + rank)


METHODS = (
  registry.Method(
    "lora_xs",
    (
      registry.Preset(
        "lora_xs",
        "LoRA-XS",
        "#56b4e9",  # sky blue (Okabe-Ito)
        "--",
        "<",
        False,
        "a small trained core between frozen factors taken from the weight",
      ),
    ),
    LoRAXS,
    _map_parameters,
    _map_flops,
    learning_rate=3e-4,  # its frozen factors carry the base's singular values
    decayed=("core",),
  ),
)
