"""DoRA (arXiv 2402.09353): LoRA on the direction, and a trained magnitude per column.

Letters as in `qlora_jax/typing.py`.
"""

import jax
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import branch, functional, memory, registry
from qlora_jax.adapters import routing as routing_lib
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array, Float, typed


class DoRA(branch.Branch):
  """y = g * ||W||_col * x (W + scaling A B) / ||W + scaling A B||_col.

  DoRA (arXiv 2402.09353), equation (5). The magnitude is stored relative to ||W||_col (g = 1 at the
  start), so that it needs no copy of the base; the source's is absolute. The norm takes no
  gradient, as in the source's section 4.3.
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


def _map_parameters(config, rank: int, inputs: int, outputs: int) -> int:
  del config
  return rank * (inputs + outputs) + outputs


def _map_flops(config, rank: int, inputs: int, outputs: int) -> float:
  del config
  # The norm of W + A B besides is made once per step, not per token.
  return 2.0 * rank * (inputs + outputs) + outputs


METHODS = (
  registry.Method(
    "dora",
    (
      registry.Preset(
        "dora",
        "DoRA",
        "#56b4e9",  # sky blue (Okabe-Ito)
        "-",
        "D",
        True,
        "LoRA on the direction of each weight column, with a trained length",
      ),
    ),
    DoRA,
    _map_parameters,
    _map_flops,
    learning_rate=1e-3,
    # Not the magnitude: it starts at one, and zero would erase the map.
  ),
)
