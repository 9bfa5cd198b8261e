"""Shared by the tests of studies: adapters of a sweep's points, quoted intervals, derived files."""

import filecmp
import functools
import re

from experiments import __main__ as command
from experiments import committed, study
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


def page_of(name):
  """The text of a study's page in the documentation."""
  return (committed.ROOT / "docs" / "studies" / f"{name}.md").read_text()


def check_derived_files(name, tmp_path, files):
  """Runs a study's command on a copy of the committed runs; compares the files that it derives."""
  record = study.load(name)
  folder, target = record.committed_results.folder, tmp_path / record.results
  committed.keep(folder, target)
  assert command.main([name, f"--results={target}"]) == 0
  _, differing, missing = filecmp.cmpfiles(folder, target, files, shallow=False)
  assert not differing and not missing, f"run python -m experiments {name}"
  assert (target / f"{name}.png").stat().st_size > 10_000
  text = (folder / "study.json").read_text()
  assert "/work" not in text and "/tmp" not in text and "/home" not in text
  return target


def check_quotes(page, name):
  """Every interval of a page is in the study's committed summary."""
  quoted = intervals_of(page)
  summary = study.load(name).committed_results.folder / "summary.md"
  assert quoted and quoted <= intervals_of(summary.read_text())
