"""The one place that chooses the order of contraction of (x A) C, with C = sum_m w_m U_m.

Multiply-adds a token for one block with `maps` adapted maps:

  operator  M R^2 once, then R^2 a map      builds C [R, R] a token, shared by the block's maps
  product   M R^2 + M R a map               never builds C; wins for one map and R > M
  gather    k R^2 a map                     reads k atoms a token; wins when k << M

`benchmarks/contraction.py` measures the three.
"""

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import functional
from qlora_jax.typing import Array

# One gathered multiply-add costs about this many dense ones: a gather streams atoms from memory.
GATHER_COST = 8.0


def choose(config: config_lib.AdapterConfig, maps: int) -> str:
  """'operator', 'product' or 'gather': the config's choice, or the cheapest by the cost model."""
  if config.contraction != "auto":
    return config.contraction
  atoms, rank, kept = config.atoms, config.rank, config.kept_atoms
  costs = {
    "operator": atoms * rank**2 + maps * rank**2,
    "product": maps * (atoms * rank**2 + atoms * rank),
    "gather": GATHER_COST * maps * kept * rank**2,
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
  """(x A) C [*batch, R] in the chosen order; `operator` is the C built for the block, if any."""
  kind = choose(config, maps)
  if kind == "operator":
    if operator is None:
      operator = functional.routed_operator(weights, atoms)
    return functional.apply_operator(low_rank, operator)
  if kind == "product":
    return functional.apply_atoms(low_rank, weights, atoms)
  return functional.gather_atoms(low_rank, weights, atoms, config.kept_atoms)
