"""The factory: chooses the adapter once, by the name of a preset.

A preset is a method or one of its controls (`registry.Preset`); every field can still be
overridden. A rank that is not given is sized to the parameter budget. So is the number of atoms if
it is given as zero beside a rank (`sizing.py`).
"""

import dataclasses
from collections.abc import Mapping

from qlora_jax import errors
from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import registry, sizing


def names() -> tuple[str, ...]:
  """The names of all presets, in the order of sweeps."""
  return tuple(registry.presets())


def learning_rate(name: str) -> float:
  """The learning rate that fine-tuning a language model with the adapter `name` starts from.

  The reasons for the rates: docs/finetuning.md.

  Raises:
    errors.UserError: for an unknown name.
  """
  check_name(name)
  return registry.family_of(name).learning_rate


def check_name(name: str) -> None:
  """Raises `errors.UserError` for a name that is no preset's."""
  if name not in registry.presets():
    raise errors.UserError(f"adapter.name: {name!r} is unknown; use one of {', '.join(names())}")


def make(
  name: str,
  overrides: Mapping[str, object],
  network: sizing.Network,
  *,
  budget: int,
  instruction_dim: int,
) -> config_lib.AdapterConfig:
  """The adapter `name`, with its overrides, sized to `budget` trainable parameters.

  Args:
    name: of a preset.
    overrides: fields of `AdapterConfig`; None keeps the preset's value. `atoms` = 0 beside a
      `rank` asks for as many atoms as fit the budget.
    network: the shapes that are adapted.
    budget: trainable parameters to match within 2 % where `rank` is not given.
    instruction_dim: E.

  Raises:
    errors.UserError: for an unknown name or an invalid field.
  """
  check_name(name)
  fields = {field: value for field, value in overrides.items() if value is not None}
  fills_atoms = fields.get("atoms") == 0 and "rank" in fields
  if fills_atoms:
    fields["atoms"] = max(fields.get("top_k", 0), config_lib.AdapterConfig.atoms)
  preset = {"family": registry.family_of(name).name, **registry.presets()[name].fields}
  adapter = config_lib.AdapterConfig(**{**preset, **fields}, instruction_dim=instruction_dim)
  if not adapter.uses_instruction:
    adapter = dataclasses.replace(adapter, instruction_dim=0)
  if fills_atoms:
    return sizing.fill(adapter, network, budget)
  if "rank" in fields or adapter.record.branch is None:
    return adapter
  return sizing.fit(adapter, network, budget, fixed_atoms="atoms" in fields)
