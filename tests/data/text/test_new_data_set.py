"""The worked example of `docs/new_data.md`, executed, and a trial on its data set."""

import pathlib
import re
import sys
import types

import numpy as np
import pytest

from qlora_jax import errors
from qlora_jax.data.text import pipeline
from qlora_jax.training import loop, progress
from qlora_jax.workloads import language, workload

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "new_data.md"


@pytest.fixture(scope="module")
def blocks():
  """The page's modules by name; unregisters the data set afterwards."""
  modules = {}
  for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
    name = re.match(r'"""(\w+)\.py', code)[1]
    modules[name] = sys.modules[name] = types.ModuleType(name)
    exec(compile(code, f"{name}.py", "exec"), modules[name].__dict__)
    assert len(code.splitlines()) < 60
  yield modules
  for name in modules:
    del sys.modules[name]
  del pipeline._DATA_SETS["roman"]


def test_the_example_is_a_data_set_like_the_others(blocks):
  data = pipeline.load("roman", seed=3)
  assert data.task_names == ("to_roman", "from_roman") and "roman" in pipeline.names()
  answers = {example.prompt: example.answers for example in data.splits["test"]}
  assert answers["35"] == ("XXXV",) and answers["XX"] == ("20",)
  prompts = [{example.prompt for example in data.splits[name]} for name in ("train", "test")]
  assert not set.intersection(*prompts)
  assert pipeline.load("roman", tasks=["to_roman"]).task_names == ("to_roman",)
  with pytest.raises(errors.UserError, match=r"data\.manual_folder has no meaning for 'roman'"):
    pipeline.load("roman", manual_folder="x")
  with pytest.raises(errors.UserError, match="unknown task 'x' of roman; known: to_roman"):
    pipeline.load("roman", tasks=["x"])


def test_the_example_trains(blocks, tiny_llama, tmp_path):
  config = blocks["mine"].get_config()
  config.model.weights, config.model.layers_per_block = str(tiny_llama), 1
  config.adapter.name, config.adapter.rank = "lora", 2
  config.optimizer.update({"steps": 2, "batch_size": 4, "learning_rate": 1e-2})
  config.data.length, config.eval.every = 128, 1
  with progress.Display(total_trials=1, plain=True) as display:
    resources = language.Resources(tmp_path, display)
    (cohort,) = resources.cohorts(config, "search", [workload.Trial(0, 1e-2)])
    trial = resources.open(cohort, tmp_path / "trial")
    result = loop.train(trial, resources.saving(cohort, tmp_path / "trial"), display)
  (row,) = result["rows"]
  assert row["task"] == "roman" and np.isfinite(row["validation_nats"])
  assert [line["step"] for line in result["curves"]] == [1, 2]


def test_a_name_is_registered_once_and_with_arguments_that_exist(blocks):
  with pytest.raises(ValueError, match="'roman' is registered already"):
    pipeline.register("roman", blocks["roman"].load)
  with pytest.raises(ValueError, match="takes 'rows'; use any of tasks, data_dir, manual_folder"):
    pipeline.register("other", blocks["roman"].load, takes=("rows",))
