"""LoRA (arXiv 2106.09685) and rsLoRA (arXiv 2312.03732), which differ in their scaling.

y = x W + scaling (x A) B, with scaling alpha/R for LoRA and alpha/sqrt(R) for rsLoRA. Letters as in
`qlora_jax/typing.py`.
"""

from qlora_jax.adapters import branch, functional, memory, registry
from qlora_jax.adapters import routing as routing_lib
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array, Float, typed


class LoRA(branch.Branch):
  """y = x W + scaling (x A) B."""

  def setup(self):
    self.lora_a, self.lora_b = self.factors()

  def projection(self) -> Array | None:
    return self.lora_a

  @typed
  def low_rank(self, x: Float[Array, "*batch D_in"]) -> Float[Array, "*batch R"]:
    """x A."""
    # Where the map's input is split over `tensor`, x A is summed over it here, R numbers per token,
    # with or without routing; all that follows is local to the token.
    return sharding.tokens(functional.project(x, self.lora_a))

  @typed
  def __call__(
    self,
    x: Float[Array, "*batch D_in"],
    base: Float[Array, "*batch D_out"],
    kernel: Float[Array, "D_in D_out"],
    routing: routing_lib.BlockRouting | None,
    shared: memory.Shared,
    low_rank: Float[Array, "*batch R"] | None = None,
  ) -> branch.Corrected:
    del kernel, routing, shared
    low_rank = self.low_rank(x) if low_rank is None else low_rank
    return base + functional.low_rank_output(low_rank, self.lora_b, self.scaling), None


def map_parameters(config, rank: int, inputs: int, outputs: int) -> int:
  """A and B."""
  del config
  return rank * (inputs + outputs)


def map_flops(config, rank: int, inputs: int, outputs: int) -> float:
  """The products with A and B."""
  del config
  return 2.0 * rank * (inputs + outputs)


_BLUE = "#0072b2"  # Okabe-Ito

METHODS = (
  registry.Method(
    "lora",
    (
      registry.Preset(
        "lora", "LoRA", _BLUE, "-", "o", True, "one low-rank update for each weight matrix"
      ),
      registry.Preset(
        "lora_input",
        "LoRA with instruction",
        _BLUE,
        "--",
        "^",
        True,
        "LoRA, with the instruction's embedding added to the network's input",
        {"instruction_in_input": True},
      ),
    ),
    LoRA,
    map_parameters,
    map_flops,
    learning_rate=1e-3,
    certified=True,
  ),
  registry.Method(
    "rslora",
    (registry.Preset("rslora", "rsLoRA", _BLUE, "-.", "v", False, "LoRA scaled by 1/sqrt(rank)"),),
    LoRA,
    map_parameters,
    map_flops,
    learning_rate=3.5e-4,  # its updates are sqrt(R) times LoRA's, at R = 8
    scaling="sqrt_rank",
    certified=True,
  ),
)
