"""The factory: chooses the adapter once, by name, from presets of `AdapterConfig`.

A preset is a method or one of its controls; every field can still be overridden. A rank that is
not given is sized to the parameter budget, and so are zero atoms at a rank that is given
(`sizing.py`).
"""

import dataclasses
from collections.abc import Mapping

from qlora_jax import errors
from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import sizing

PRESETS: dict[str, dict] = {
  "none": {"method": "none"},
  "full": {"method": "full"},
  "full_input": {"method": "full", "instruction_in_input": True},
  "lora": {"method": "lora"},
  "lora_input": {"method": "lora", "instruction_in_input": True},
  "rslora": {"method": "rslora"},
  "dora": {"method": "dora"},
  "lora_xs": {"method": "lora_xs"},
  "comol": {"method": "comol"},
  "lily": {"method": "lily"},
  "queryable": {},
  "queryable_topk": {"top_k": 4},
  "queryable_recurrent": {"summary": "recurrent"},
  "queryable_no_summary": {"summary": "none"},
  "queryable_query": {"instruction_in_query": True},
  "queryable_prior": {"prior_weight": 1.0},
  "queryable_kl": {"kl_weight": 0.01},
  "queryable_prior_query": {"prior_weight": 1.0, "instruction_in_query": True},
  "static": {"routing": "static", "summary": "none"},
  "uniform": {"top_k": 4, "weights": "equal"},
}


# Rates of a language model where the config gives none, by method; reasons: docs/finetuning.md.
LEARNING_RATES = {
  "none": 1e-3,  # nothing is trained
  "full": 1e-4,  # a tenth of LoRA's
  "lora": 1e-3,
  "rslora": 3.5e-4,  # its updates are sqrt(R) times LoRA's, at R = 8
  "dora": 1e-3,
  "lora_xs": 3e-4,  # its frozen factors carry the base's singular values
  "comol": 1e-3,
  "lily": 1e-3,
  "queryable": 1e-3,
}


def learning_rate(name: str) -> float:
  """The learning rate that fine-tuning a language model with the adapter `name` starts from.

  Raises:
    errors.UserError: for an unknown name.
  """
  check_name(name)
  return LEARNING_RATES[PRESETS[name].get("method", config_lib.AdapterConfig.method)]


def check_name(name: str) -> None:
  """Raises `errors.UserError` for a name that is no preset's."""
  if name not in PRESETS:
    raise errors.UserError(f"adapter.name: {name!r} is unknown; use one of {', '.join(PRESETS)}")


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
    name: a key of `PRESETS`.
    overrides: fields of `AdapterConfig`; None keeps the preset's value. `atoms` = 0 beside a
      `rank` asks for as many atoms as the budget has room for.
    network: the shapes that are adapted.
    budget: trainable parameters to match within 2 % where `rank` is not given.
    instruction_dim: E.

  Raises:
    errors.UserError: for an unknown name or an invalid field.
  """
  check_name(name)
  given = {field: value for field, value in overrides.items() if value is not None}
  to_fill = given.get("atoms") == 0 and "rank" in given
  if to_fill:
    given["atoms"] = max(given.get("top_k", 0), config_lib.AdapterConfig.atoms)
  settings = {**PRESETS[name], **given}
  adapter = config_lib.AdapterConfig(**settings, instruction_dim=instruction_dim)
  if not adapter.uses_instruction:
    adapter = dataclasses.replace(adapter, instruction_dim=0)
  if to_fill:
    return sizing.fill(adapter, network, budget)
  if "rank" in given or adapter.method in ("none", "full"):
    return adapter
  return sizing.fit(adapter, network, budget, fixed_atoms="atoms" in given)
