"""The worked example of `docs/new_adapter.md`: a family that no file of the library names."""

import importlib.util
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn

from configs import regression as regression_config
from experiments.report import style
from qlora_jax import errors
from qlora_jax.adapters import config, factory, methods, registry, sizing
from qlora_jax.models import decoder, mlp
from qlora_jax.planning import flops
from qlora_jax.studies import study
from qlora_jax.training import loop, optimizer, progress
from qlora_jax.workloads import regression, workload
from qlora_jax.workloads import regression_config as settings

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "new_adapter.md"
NAME = "diagonal_lora"
SHAPE = mlp.MLPConfig(inputs=5, width=16, hidden=12, layers=4, layers_per_block=2)
DECODER = decoder.DecoderConfig(
  vocabulary=64, width=16, hidden=24, layers=2, heads=4, groups=2, head_dim=4, adapted=("q", "up")
)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, SHAPE.inputs)).astype("f")
TOKENS = RNG.integers(0, DECODER.vocabulary, (2, 7))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """The page's Python block, as a file."""
  (text,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
  assert len(text.splitlines()) < 60
  path = tmp_path_factory.mktemp("methods") / f"{NAME}.py"
  path.write_text(text)
  return path


@pytest.fixture
def family(source):
  """The example, registered from outside the package."""
  spec = importlib.util.spec_from_file_location(NAME, source)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  (method,) = module.METHODS
  registry.register(method)
  yield method
  registry.unregister(method.name)


MODELS = {
  "mlp": (settings.shapes(SHAPE), lambda adapter: mlp.MLP(SHAPE, adapter), X),
  "decoder": (DECODER.network(), lambda adapter: decoder.Decoder(DECODER, adapter), TOKENS),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_factory_builds_it_to_a_budget_that_the_real_tree_has(family, model):
  network, build, inputs = MODELS[model]
  adapter = factory.make(NAME, {}, network, budget=800, instruction_dim=0)
  variables = nn.meta.unbox(jax.eval_shape(build(adapter).init, jax.random.key(0), inputs))
  leaves = jax.tree.leaves(variables["params"])
  assert sum(leaf.size for leaf in leaves) == sizing.count(adapter, network)
  assert abs(sizing.count(adapter, network) / 800 - 1) <= sizing.TOLERANCE
  decayed = jax.tree_util.tree_flatten_with_path(optimizer.decayed(variables["params"]))[0]
  for path, decays in decayed:
    assert decays == (path[-1].key in family.decayed)


def test_its_branch_corrects_every_map(family):
  adapter = config.AdapterConfig(family=NAME, rank=3)
  model = mlp.MLP(SHAPE, adapter)
  variables = nn.meta.unbox(model.init(jax.random.key(0), X))
  base = mlp.MLP(SHAPE, config.AdapterConfig(family="none"))
  expected = base.apply({"base": variables["base"]}, X).values
  np.testing.assert_array_equal(model.apply(variables, X).values, expected)
  params = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])
  assert np.abs(model.apply({**variables, "params": params}, X).values - expected).max() > 1e-3


def test_the_regression_workload_trains_it(family, tmp_path, shared_data):
  run = regression_config.get_config("runlocal")
  run.data.data_dir = str(shared_data)
  run.model.update(dict(width=16, hidden=16))
  run.optimizer.steps, run.pretrain.steps, run.eval.every = 40, 60, 10
  run.adapter.name, run.adapter.budget = NAME, 1056
  cohort = workload.Cohort(run.lock(), "search", (workload.Trial(0, 1e-2),))
  with progress.Display(total_trials=1, plain=True) as display:
    resources = regression.Resources(tmp_path, display)
    directory = study.directory_of(tmp_path, cohort)
    training = resources.open(cohort, directory)
    (row,) = loop.train(training, resources.saving(cohort, directory), display)["rows"]
  assert row["arm"] == NAME and not row["diverged"]
  assert row["trainable_params"] == 1056
  assert 0 < row["test_mse"] < row["base_mse"]


def test_reports_label_it_and_list_it_after_the_built_in_methods(family):
  look = style.method(NAME)
  assert (look.label, look.color, look.marker) == ("Diagonal LoRA", "#8c564b", "D")
  assert style.method(f"{NAME}+prompt").label == "Diagonal LoRA + prompt"
  assert style.ordered([NAME, "uniform", "none", "unknown"]) == ["none", "uniform", NAME, "unknown"]


def test_a_plan_counts_its_flops_and_a_run_without_a_rate_has_one(family):
  adapter = config.AdapterConfig(family=NAME, rank=3)
  work = flops.step(DECODER, adapter, rows=2, length=7, answers=5)
  widths = sum(sum(DECODER.map_shapes[name]) for name in DECODER.adapted)
  per_token = DECODER.layers * (2 * 3 * widths + len(DECODER.adapted) * 3)
  assert work.adapter == 3 * 14 * per_token and work.routing == 0
  assert factory.learning_rate(NAME) == family.learning_rate


def test_a_name_is_registered_once_and_forgotten_by_unregister(family):
  with pytest.raises(errors.UserError, match="registered already"):
    registry.register(family)
  registry.unregister(NAME)
  try:
    with pytest.raises(errors.UserError, match=f"{NAME!r} is unknown"):
      factory.check_name(NAME)
    with pytest.raises(errors.UserError, match=r"adapter\.family"):
      config.AdapterConfig(family=NAME)
  finally:
    registry.register(family)


def test_a_file_in_the_folder_of_methods_is_a_family(source, monkeypatch):
  monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(source.parent)])
  monkeypatch.delitem(sys.modules, f"{methods.__name__}.{NAME}", raising=False)
  assert [method.name for method in methods.load()] == [
    *(method.name for method in methods.BUILT_IN),
    NAME,
  ]
  monkeypatch.delitem(sys.modules, f"{methods.__name__}.{NAME}")


def test_the_presets_of_a_legend_are_those_of_its_family():
  for family in registry.families():
    names = [preset.name for preset in family.presets]
    assert not family.legend or sorted(family.legend) == sorted(names)
