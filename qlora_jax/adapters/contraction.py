"""The one place that chooses the order of contraction of (x A) C, with C = sum_m w_m U_m.

Multiply-adds a token for one block with `maps` adapted maps:

  operator  M R^2 once, then R^2 a map      builds C [R, R] a token, shared by the block's maps
  product   M R^2 + M R a map               never builds C; wins for one map and R > M
  gather    k R^2 once, then R^2 a map      builds C from k atoms; wins when k << M

`benchmarks/contraction.py` measures the three.
"""

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import functional
from qlora_jax.typing import Array

# One gathered multiply-add counts as this many dense ones: a gather streams atoms from memory, its
# gradient scatters them back, and a matrix unit multiplies almost for nothing. On two CPU cores the
# two break even at about 8 for R = 16 and above 16 for R = 64 (`benchmarks/contraction.py`).
GATHER_COST = 32.0


def choose(config: config_lib.AdapterConfig, maps: int) -> str:
  """The order that the config names, or the cheapest by the cost model."""
  if config.contraction != "auto":
    return config.contraction
  atoms, rank, kept = config.atoms, config.rank, config.kept_atoms
  costs = {
    "operator": atoms * rank**2 + maps * rank**2,
    "product": maps * (atoms * rank**2 + atoms * rank),
    "gather": GATHER_COST * kept * rank**2 + maps * rank**2,
  }
  return min(costs, key=costs.get)


def contract(
  config: config_lib.AdapterConfig,
  maps: int,
  low_rank: Array,
  weights: Array,
  operator: Array | None,
  atoms: Array,
) -> Array:
  """(x A) C [*batch, R] in the chosen order.

  Args:
    config, maps: as in `choose`.
    low_rank: x A [*batch, R]; weights: [*batch, M]; atoms: [M, R, R].
    operator: the C built for the block, if any.
  """
  kind = choose(config, maps)
  if kind == "product":
    return functional.apply_atoms(low_rank, weights, atoms)
  if operator is None and kind == "operator":
    operator = functional.routed_operator(weights, atoms)
  if operator is None:
    return functional.gather_atoms(low_rank, weights, atoms, config.kept_atoms)
  return functional.apply_operator(low_rank, operator)
