"""The one place that chooses the order of contraction of (x A) C, with C = sum_m w_m U_m.

Multiply-adds per token for one block with `maps` adapted maps:

  operator  M R^2 once, then R^2 per map      builds C [R, R] per token, shared by the block's maps
  product   M R^2 + M R per map               never builds C; wins for one map and R > M
  gather    k R^2 once, then R^2 per map      builds C from k atoms; wins when k << M

`benchmarks/contraction.py` measures the three.
"""

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import functional, routing
from qlora_jax.typing import Array, Float, typed

# One gathered multiply-add counts as this many dense ones: a gather streams atoms from memory, its
# gradient scatters them back, and a matrix unit multiplies almost for nothing. On two CPU cores the
# two break even at about 8 for R = 16 and above 16 for R = 64 (`benchmarks/contraction.py`).
GATHER_COST = 32.0


def choose(config: config_lib.AdapterConfig, maps: int) -> str:
  """The order that the config names, or the cheapest by the cost model."""
  if config.contraction != "auto":
    return config.contraction
  atoms, rank, kept_atoms = config.atoms, config.rank, config.kept_atoms
  costs = {
    "operator": atoms * rank**2 + maps * rank**2,
    "product": maps * (atoms * rank**2 + atoms * rank),
    "gather": GATHER_COST * kept_atoms * rank**2 + maps * rank**2,
  }
  return min(costs, key=costs.get)


@typed
def contract(
  routed: routing.Routing,
  low_rank: Float[Array, "*batch R"],
  atoms: Float[Array, "M R R2"],
  kept_atoms: int,
) -> Float[Array, "*batch R2"]:
  """(x A) C in the order that the routing carries.

  Args:
    routed: weights, the order, and C where the router built it.
    low_rank: x A; atoms: U.
    kept_atoms: k, the atoms with weight.
  """
  operator = routed.operator
  if routed.order == "product":
    return functional.apply_atoms(low_rank, routed.weights, atoms)
  if operator is None and routed.order == "operator":
    operator = functional.routed_operator(routed.weights, atoms)
  if operator is None:
    return functional.gather_atoms(low_rank, routed.weights, atoms, kept_atoms)
  return functional.apply_operator(low_rank, operator)


def flops(config: config_lib.AdapterConfig, states: int, order: str) -> float:
  """FLOPs per token of (x A) C for `states` low-rank states of a block, in the given order."""
  rank, atoms = config.rank, config.atoms
  if order == "operator":
    return 2.0 * rank**2 * (atoms + states)
  if order == "product":
    return states * 2.0 * (atoms * rank**2 + atoms * rank)
  return 2.0 * rank**2 * (config.kept_atoms + states)
