"""Trainable parameters in closed form, and adapters sized to a common budget.

The formulas are those of `docs/method.md`, one per family in `methods/`; tests compare them with
real parameter trees.
"""

import dataclasses
import itertools
import math

from qlora_jax import errors
from qlora_jax.adapters import config as config_lib

TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Network:
  """The shapes that an adapter meets.

  Attributes:
    maps: (name, D_in, D_out) of every adapted map of a layer, the anchor map first.
    layers: L; blocks: N.
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
  family = adapter.record
  total = network.base_parameters if family.trains_base else 0
  for name, inputs, outputs in network.maps:
    rank = adapter.rank_of(name)
    total += network.layers * family.map_parameters(adapter, rank, inputs, outputs)
  if family.shared:
    map_outputs = tuple((name, outputs, "output") for name, _, outputs in network.maps)
    total += sum(math.prod(leaf.shape) for leaf in family.shared(adapter, map_outputs))
  if family.block_parameters:
    total += network.blocks * family.block_parameters(adapter, len(network.maps))
  if adapter.instruction_in_input:
    total += adapter.instruction_dim * network.width
  return total


def fit(
  adapter: config_lib.AdapterConfig,
  network: Network,
  budget: int,
  *,
  tolerance: float = TOLERANCE,
  fixed_atoms: bool = False,
) -> config_lib.AdapterConfig:
  """`adapter` with the rank (and atoms, or ranks per map) that match `budget` parameters.

  Of the candidates within the tolerance the one nearest to the adapter's number of atoms wins,
  then the nearest count. Families without a router may differ in rank between maps; the others may
  change `atoms` unless `fixed_atoms`.

  Raises:
    errors.UserError: when no candidate comes within the tolerance.
  """
  candidates = [
    (abs(_atom_distance(candidate, adapter)), abs(count(candidate, network) - budget), candidate)
    for candidate in _candidates(adapter, network, budget, fixed_atoms)
  ]
  within = [candidate for candidate in candidates if candidate[1] <= tolerance * budget]
  if not within:
    nearest = min(candidates, key=lambda candidate: candidate[1], default=None)
    close = f"; the nearest has {count(nearest[2], network)}" if nearest else ""
    raise errors.UserError(
      f"adapter.budget: no {adapter.family} adapter has {budget} trainable parameters within"
      f" {tolerance:.0%}{close}; set adapter.rank, or another adapter.budget"
    )
  return min(within, key=lambda candidate: candidate[:2])[2]


def fill(
  adapter: config_lib.AdapterConfig, network: Network, budget: int
) -> config_lib.AdapterConfig:
  """`adapter` at its rank, with the number of atoms that comes nearest to `budget`.

  Raises:
    errors.UserError: when no number of atoms comes within the tolerance.
  """
  least = max(adapter.top_k, 1)
  first, second = (
    count(dataclasses.replace(adapter, atoms=atoms), network) for atoms in (least, least + 1)
  )
  if first == second:
    raise errors.UserError(f"adapter.atoms: {adapter.family} has no atoms; give a number above 0")
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
    if not adapter.has_router:
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
    counts = [
      count(dataclasses.replace(adapter, rank=rank, atoms=atoms), network)
      for atoms in (smallest, smallest + 1)
    ]
    if counts[0] > (1 + TOLERANCE) * budget:
      return
    # The count is linear in atoms: the best number is where the line meets the budget.
    best = smallest + (budget - counts[0]) / (counts[1] - counts[0])
    for atoms in {max(smallest, int(best)), max(smallest, int(best) + 1)}:
      yield dataclasses.replace(adapter, rank=rank, atoms=atoms)
    if counts[0] <= budget:
      yield dataclasses.replace(adapter, rank=rank)
