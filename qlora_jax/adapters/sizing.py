"""Trainable parameters in closed form, and adapters sized to a common budget.

The formulas are those of `docs/method.md`; a test holds them against real parameter trees.
"""

import dataclasses
import itertools

from qlora_jax import errors
from qlora_jax.adapters import config as config_lib

TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Network:
  """The shapes that an adapter meets.

  Attributes:
    maps: (name, D_in, D_out) of every adapted map of a layer, the anchor map first.
    layers: L.
    blocks: N.
    width: D of the instruction's map into the input.
    base_parameters: parameters of the base, which full fine-tuning trains.
  """

  maps: tuple[tuple[str, int, int], ...]
  layers: int
  blocks: int
  width: int
  base_parameters: int


def count(adapter: config_lib.AdapterConfig, network: Network) -> int:
  """Trainable parameters of `adapter` on `network`."""
  total = 0
  if adapter.method == "full":
    total += network.base_parameters
  for name, inputs, outputs in network.maps:
    total += network.layers * _count_map(adapter, name, inputs, outputs)
  if adapter.method == "lily":  # experts B [M, R, D_out] a map name, shared over the layers
    total += sum(adapter.atoms * adapter.rank * outputs for _, _, outputs in network.maps)
  if adapter.routed:
    routers = len(network.maps) if adapter.operator == "map" else 1
    memories = len(network.maps) if adapter.memory == "map" else 1
    total += _count_memory(adapter, memories) + network.blocks * routers * _count_router(adapter)
    if routers > 1 and adapter.uses_query and adapter.summary == "recurrent":
      total -= network.blocks * (routers - 1) * adapter.rank  # one gate a block
  if adapter.instruction_in_input:
    total += adapter.instruction_dim * network.width
  return total


def _count_map(adapter, name, inputs, outputs) -> int:
  rank, atoms = adapter.rank_of(name), adapter.atoms
  low_rank = rank * (inputs + outputs)
  match adapter.method:
    case "none" | "full":
      return 0
    case "dora":
      return low_rank + outputs
    case "lora_xs":
      return rank * rank
    case "comol":
      return low_rank + atoms * rank * rank + rank * atoms
    case "lily":
      return rank * inputs + rank * atoms
  return low_rank


def _count_memory(adapter, memories: int) -> int:
  per_atom = memories * adapter.rank**2
  projection = 0
  if adapter.uses_query:
    per_atom += memories * adapter.query_dim
  if adapter.uses_prior:
    per_atom += adapter.prior_dim or adapter.instruction_dim
    projection = adapter.instruction_dim * adapter.prior_dim
  return adapter.atoms * per_atom + projection


def _count_router(adapter) -> int:
  if not adapter.uses_query:
    return adapter.atoms
  inputs = adapter.rank * (adapter.query_state + (adapter.summary != "none"))
  inputs += adapter.instruction_dim * adapter.instruction_in_query + adapter.query_bias
  # The pseudo-query of `attention` and the gate of `recurrent` both have width R.
  return inputs * adapter.query_dim + adapter.rank * (adapter.summary != "none")


def fit(
  adapter: config_lib.AdapterConfig,
  network: Network,
  budget: int,
  *,
  tolerance: float = TOLERANCE,
  fixed_atoms: bool = False,
) -> config_lib.AdapterConfig:
  """`adapter` with the rank (and atoms, or ranks a map) that match `budget` parameters.

  Of the candidates within the tolerance the one nearest to the adapter's own number of atoms
  wins, then the nearest count. Families without a shared core may differ in rank between maps;
  the others may change `atoms` unless `fixed_atoms`.

  Raises:
    errors.UserError: when no candidate comes within the tolerance.
  """
  candidates = [
    (abs(_atom_distance(candidate, adapter)), abs(count(candidate, network) - budget), candidate)
    for candidate in _candidates(adapter, network, budget, fixed_atoms)
  ]
  within = [each for each in candidates if each[1] <= tolerance * budget]
  if not within:
    nearest = min(candidates, key=lambda each: each[1], default=None)
    close = f"; the nearest has {count(nearest[2], network)}" if nearest else ""
    raise errors.UserError(
      f"adapter.budget: no {adapter.method} adapter has {budget} trainable parameters within"
      f" {tolerance:.0%}{close}; set adapter.rank, or another adapter.budget"
    )
  return min(within, key=lambda each: each[:2])[2]


def fill(
  adapter: config_lib.AdapterConfig, network: Network, budget: int
) -> config_lib.AdapterConfig:
  """`adapter` at its own rank, with the number of atoms that comes nearest to `budget`.

  Raises:
    errors.UserError: when that is further from the budget than the tolerance.
  """
  least = max(adapter.top_k, 1)
  first, second = (
    count(dataclasses.replace(adapter, atoms=atoms), network) for atoms in (least, least + 1)
  )
  if first == second:
    raise errors.UserError(f"adapter.atoms: {adapter.method} has no atoms; give a number above 0")
  filled = dataclasses.replace(
    adapter, atoms=max(least, least + round((budget - first) / (second - first)))
  )
  if abs(count(filled, network) - budget) > TOLERANCE * budget:
    raise errors.UserError(
      f"adapter.atoms: no number of atoms gives rank {adapter.rank} {budget} trainable parameters"
      f" within {TOLERANCE:.0%}; the nearest has {count(filled, network)}"
    )
  return filled


def _atom_distance(candidate, adapter) -> float:
  return candidate.atoms / adapter.atoms + adapter.atoms / candidate.atoms


def _candidates(adapter, network, budget, fixed_atoms):
  names = [name for name, _, _ in network.maps]
  widest = min(min(shape[1:]) for shape in network.maps)
  for rank in range(1, widest + 1):
    if adapter.method in ("lora", "rslora", "dora", "lora_xs"):
      if count(dataclasses.replace(adapter, rank=rank), network) > 2 * budget:
        return
      for extra in itertools.product((0, 1), repeat=len(names)):
        if all(extra) or (rank + 1 > widest and any(extra)):
          continue  # the same as the next rank, or wider than the map
        ranks = tuple((name, rank + 1) for name, more in zip(names, extra, strict=True) if more)
        yield dataclasses.replace(adapter, rank=rank, map_ranks=ranks)
      continue
    if fixed_atoms:
      yield dataclasses.replace(adapter, rank=rank)
      continue
    smallest = max(adapter.top_k, 2)
    at = [
      count(dataclasses.replace(adapter, rank=rank, atoms=atoms), network)
      for atoms in (smallest, smallest + 1)
    ]
    if at[0] > (1 + TOLERANCE) * budget:
      return
    # The count is linear in atoms: the best number is where the line meets the budget.
    best = smallest + (budget - at[0]) / (at[1] - at[0])
    for atoms in {max(smallest, int(best)), max(smallest, int(best) + 1)}:
      yield dataclasses.replace(adapter, rank=rank, atoms=atoms)
    if at[0] <= budget:
      yield dataclasses.replace(adapter, rank=rank)
