"""What the tests of kept studies share: the adapters of a sweep's points, and quoted intervals."""

import functools
import re

from qlora_jax import sweeps
from qlora_jax.adapters import factory, sizing
from qlora_jax.models import mlp
from qlora_jax.workloads import regression_config as settings


@functools.cache
def network(model):
  return settings.shapes(model)


def sized(base, point):
  """The adapter of a sweep's point and its parameters, as `settings.resolve` makes them."""
  own = base.copy_and_resolve_references()
  own.update_from_flattened_dict(point)
  overrides = dict(own.adapter)
  name, budget = overrides.pop("name"), overrides.pop("budget")
  shapes = network(mlp.MLPConfig(**own.model))
  adapter = factory.make(
    name, overrides, shapes, budget=budget, instruction_dim=own.instruction.dim
  )
  return adapter, sizing.count(adapter, shapes), budget


def settings_of(module):
  points = [p for p in module.get_hyper(sweeps) if p["optimizer.learning_rate"] == 1e-3]
  return [(p.get("data.task"), p["label"], *sized(module.get_config(), p)) for p in points]


def intervals_of(page):
  """Every [low, high] in a text."""
  return set(re.findall(r"\[[+-]?\d+\.\d+, [+-]?\d+\.\d+\]", page))
