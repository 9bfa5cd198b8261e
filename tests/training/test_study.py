"""The study end to end on a tiny network: grouping, resuming, choosing, and bad input."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import in_process
import jax
import numpy as np
import pandas as pd
import pytest

from experiments import report
from qlora_jax import errors, sweeps
from qlora_jax.adapters import registry, rerouting
from qlora_jax.studies import study
from qlora_jax.studies import workdir as workdir_lib
from qlora_jax.training import checkpoint, loop, progress, step
from qlora_jax.workloads import cohort_program, regression, workload
from qlora_jax.workloads import regression_config as settings

ROOT = pathlib.Path(__file__).parents[2]


def load_config_module():
  spec = importlib.util.spec_from_file_location("regression", ROOT / "configs" / "regression.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


REGRESSION = load_config_module()


@pytest.fixture
def tiny(shared_data):
  config = REGRESSION.get_config("runlocal")
  config.data.data_dir = str(shared_data)
  config.model.update(dict(width=16, hidden=16))
  config.optimizer.steps, config.pretrain.steps, config.eval.every = 40, 60, 10
  config.adapter.budget = 1024
  config.protocol.search_seeds, config.protocol.final_seeds = (0,), (100, 101)
  return config.lock()


def train(workdir, cohort):
  with progress.Display(total_trials=len(cohort.trials), plain=True) as display:
    resources = regression.Resources(workdir, display)
    directory = study.directory_of(workdir, cohort)
    training = resources.open(cohort, directory)
    return loop.train(training, resources.saving(cohort, directory), display)


def cohort_of(config, stage, *trials):
  return workload.Cohort(config, stage, tuple(workload.Trial(*trial) for trial in trials))


@pytest.mark.parametrize("name", ["lora", "queryable", "queryable_topk"])
def test_a_trial_in_a_cohort_equals_the_trial_alone(tiny, tmp_path, name):
  config = tiny.copy_and_resolve_references()
  config.adapter.name = name
  runs = ((0, 3e-3), (0, 1e-2), (1, 1e-2))
  together = train(tmp_path / "cohort", cohort_of(config, "search", *runs))
  alone = train(tmp_path / "alone", cohort_of(config, "search", *runs[2:]))
  # Batched and single matrix products add in another order: float32 rounding over 40 steps.
  np.testing.assert_allclose(
    together["rows"][2]["test_mse"], alone["rows"][0]["test_mse"], rtol=1e-3
  )


def test_a_cohort_filled_up_with_copies_gives_the_same_rows(tiny, tmp_path):
  config = tiny.copy_and_resolve_references()
  rows = []
  for least in (1, 5):
    config.protocol.least_runs = least
    spec = cohort_of(config, "final", (100, 1e-2), (101, 1e-2))
    seeds, runs, row = regression.layout(spec)
    assert (len(seeds), len(runs)) == ((2, 2) if least == 1 else (5, 5))
    assert list(row) == [0, 1, 1, 1, 1][: len(runs)]
    rows.append([each["test_mse"] for each in train(tmp_path / str(least), spec)["rows"]])
  np.testing.assert_allclose(*rows, rtol=1e-3)


def test_the_instruction_told_wrongly_is_another_run_and_a_label_names_it(tiny, tmp_path):
  config = tiny.copy_and_resolve_references()
  config.data.task, config.adapter.name = "multi_target", "lora_input"
  found = []
  for shuffled in (False, True):
    config.instruction.shuffled, config.label = shuffled, f"told {not shuffled}"
    spec = cohort_of(config, "search", (0, 1e-2))
    found.append(train(tmp_path, spec)["rows"][0])
  true, shuffled = found
  assert (true["arm"], shuffled["arm"]) == ("told True", "told False")
  assert true["validation_mse"] < shuffled["validation_mse"]
  assert true["test_known_mse"] != true["test_mse"]  # other wordings of the same instructions
  assert shuffled["test_known_mse"] == shuffled["test_mse"]  # nothing is known of these


class Killed(Exception):
  pass


def test_a_killed_cohort_resumes_to_the_same_bits(tiny, tmp_path, monkeypatch):
  config = tiny.copy_and_resolve_references()
  config.checkpoint.seconds = 0.0
  spec = cohort_of(config, "search", (0, 1e-2), (1, 1e-2))
  whole = train(tmp_path / "whole", spec)
  save = checkpoint.Checkpointer.save

  def save_then_die(saver, step, *arguments, **options):
    save(saver, step, *arguments, **options)
    if saver.directory.name == "checkpoints" and step == 20:
      raise Killed

  monkeypatch.setattr(checkpoint.Checkpointer, "save", save_then_die)
  with pytest.raises(Killed):
    train(tmp_path / "killed", spec)
  monkeypatch.setattr(checkpoint.Checkpointer, "save", save)
  resumed = train(tmp_path / "killed", spec)
  assert [r["test_mse"] for r in resumed["rows"]] == [r["test_mse"] for r in whole["rows"]]
  assert resumed["curves"] == whole["curves"]


def test_a_sweep_writes_tables_and_a_report_and_skips_what_is_finished(tiny, tmp_path, monkeypatch):
  points = sweeps.product(
    sweeps.sweep("adapter.name", ("none", "lora", "queryable_prior")),
    sweeps.sweep("optimizer.learning_rate", (1e-3, 1e-2)),
  )
  workdir_lib.prepare(tmp_path, tiny, "test")
  study.run(tiny, points, tmp_path)
  rows = pd.read_parquet(tmp_path / "results.parquet")
  assert len(rows) == 1 + 2 + 2 * (2 + 2)
  final = rows[rows.stage == "final"]
  for name, own in final[final.arm != "none"].groupby("arm"):
    search = rows[(rows.stage == "search") & (rows.arm == name)]
    best = search.groupby("learning_rate")["validation_mse"].mean().idxmin()
    assert set(own.learning_rate) == {best}
  routing = pd.read_parquet(tmp_path / "routing.parquet")
  sums = routing.groupby(["arm", "target", "with_instruction", "block"])["weight"].sum()
  np.testing.assert_allclose(sums, 1.0, atol=1e-5)
  assert report.write_report(tmp_path).stat().st_size > 10_000
  monkeypatch.setattr(loop, "train", None)  # training anything again would now fail
  expected, shown = [], progress.Display
  monkeypatch.setattr(
    progress, "Display", lambda **given: expected.append(given["earlier_trials"]) or shown(**given)
  )
  study.run(tiny, points, tmp_path)
  last = final[final.arm == "lora"].trial_id.iloc[0].split("-")[0]
  (tmp_path / "cohorts" / last / "result.json").unlink()
  with pytest.raises(TypeError):  # LoRA's final runs are not there, and training is None
    study.run(tiny, points, tmp_path)
  assert expected == [len(rows), len(rows) - 2]


def test_runs_sharded_over_two_devices_equal_one_device(tmp_path):
  code = """
import jax; jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp, numpy as np
from qlora_jax.adapters import config as adapter_config
from qlora_jax.models import mlp
from qlora_jax.training import optimizer, step
from qlora_jax.workloads import cohort_program as group
from qlora_jax.workloads import regression_config as settings
shape = mlp.MLPConfig(inputs=4, width=8, hidden=8, layers=2, layers_per_block=1)
model = mlp.MLP(shape, adapter_config.AdapterConfig(rank=2, atoms=3))
base = settings.random_base(shape, 0)
rng = np.random.default_rng(0)
batch = step.Batch(rng.normal(size=(2, 5, 8, 4)).astype("f"),
                   rng.normal(size=(2, 5, 8)).astype("f"),
                   np.zeros((2, 5, 8, 1), "f"))
losses = []
for devices in (1, 2):
  program = group.Program(model, optimizer.OptimizerConfig(steps=5), devices)
  states, frozen = program.init(base, np.array([0, 0, 1, 1]), np.full(4, 1e-2))
  states, _ = program.train(states, frozen, batch, np.array([0, 0, 1, 1]))
  assert len(jax.tree.leaves(states.params)[0].sharding.device_set) == devices
  losses.append(jax.device_get(states.params))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *losses)
"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_frozen_base_is_not_part_of_the_state(tiny):
  resolved = settings.resolve(tiny)
  program = cohort_program.program(resolved.network, resolved.optimizer)
  base = settings.random_base(resolved.model, 0)
  states, _ = program.init(base, np.array([0]), np.array([1e-2]))
  counted = sum(leaf.size for leaf in jax.tree.leaves(states.params))
  assert counted == resolved.trainable_params


@pytest.mark.parametrize("variant", REGRESSION.VARIANTS)
def test_every_point_of_every_variant_resolves_within_two_percent(variant):
  config = REGRESSION.get_config(variant)
  for own, _ in study.expand(config, REGRESSION.get_hyper(sweeps, variant)):
    resolved = settings.resolve(own)
    if registry.family_of(own.adapter.name).branch is not None:
      assert abs(resolved.trainable_params / own.adapter.budget - 1) <= 0.02


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--config=configs/regression.py:nope"], "variant"),
    (["--config=configs/regression.py:runlocal", "--config.adapter.rnk=3"], "rnk"),
    (["--config=configs/regression.py:runlocal", "--config.adapter.rank=0"], "adapter.rank"),
    (
      ["--config=configs/regression.py:runlocal", "--config.adapter.top_k=99"],
      "adapter.top_k",
    ),
    (
      ["--config=configs/regression.py:runlocal", "--config.model.layers_per_block=3"],
      "model.layers_per_block",
    ),
    (["--config=configs/regression.py:runlocal", "--config.data.task=nope"], "nope"),
    (["--config=configs/regression.py", "--config.pretrain.steps=0"], "pretrain.steps: 0"),
    (["--config=configs/regression.py", "--config.pretrain.seed=-1"], "pretrain.seed: -1"),
    (
      ["--config=configs/regression.py", "--config.pretrain.learning_rate=0.0"],
      "pretrain.learning_rate: 0.0",
    ),
    (["--config=configs/absent.py"], "absent"),
    (["--config=configs/absent.py:demo", "--config.adapter.rank=4"], "absent"),
    ([], "--config"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, said):
  workdir = tmp_path / "run"
  done = in_process.run(["launch.py", f"--workdir={workdir}", *arguments])
  assert done.returncode == 2, done.stderr
  assert len(done.stderr.strip().splitlines()) == 1 and said in done.stderr
  assert not workdir.exists()


def test_a_work_directory_of_another_config_is_refused_by_field(tiny, tmp_path):
  workdir_lib.prepare(tmp_path, tiny, "test")
  before = json.loads((tmp_path / "study.json").read_text())
  other = tiny.copy_and_resolve_references()
  other.optimizer.steps = 41
  with pytest.raises(errors.UserError, match=r"optimizer\.steps was 40, is 41;"):
    workdir_lib.prepare(tmp_path, other, "test")
  assert json.loads((tmp_path / "study.json").read_text()) == before


def test_a_work_directory_goes_on_with_other_checkpoints_and_another_mesh(tiny, tmp_path):
  workdir_lib.prepare(tmp_path, tiny, "test")
  other = tiny.copy_and_resolve_references()
  other.checkpoint.keep, other.mesh.runs = 5, 2
  workdir_lib.prepare(tmp_path, other, "test")


def test_an_empty_learning_rate_list_is_refused():
  with pytest.raises(errors.UserError, match=r"optimizer\.learning_rate"):
    sweeps.sweep("optimizer.learning_rate", [])


def test_each_trial_of_a_cohort_has_what_its_own_routing_gains(tiny, tmp_path, monkeypatch):
  """Recomputed by hand from what the measurement was given, for the second of two runs."""
  config = tiny.copy_and_resolve_references()
  config.adapter.name, config.protocol.least_runs = "queryable", 3
  config.eval.routing_every = 20
  calls, measure = [], cohort_program.Program.routing_gain

  def noted(program, params, initial, frozen, batches, row):
    calls.append(jax.device_get((params, initial, frozen, batches, row)))
    return measure(program, params, initial, frozen, batches, row)

  monkeypatch.setattr(cohort_program.Program, "routing_gain", noted)
  trained = train(tmp_path, cohort_of(config, "final", (100, 1e-2), (101, 3e-2)))
  assert len(calls) == 3  # after 20 and 40 steps on validation rows, and at the end on test rows
  resolved = settings.resolve(config)
  program = cohort_program.program(resolved.network, resolved.optimizer)
  for call, rows in zip(calls, ("curve 20", "curve 40", "row"), strict=True):
    params, initial, frozen, batches, row = call
    second = jax.tree.map(lambda leaf: leaf[1], (params, initial))
    batch = jax.tree.map(lambda leaf, place=row[1]: leaf[place], batches)
    trained_, drawn = (
      jax.jit(program.model.apply)(
        step.variables(program.model, tree, frozen), batch.features, batch.instruction
      )
      for tree in second
    )
    weights, uniform = trained_.routing.weights, np.full((4, 1, resolved.adapter.atoms), 1.0, "f")
    replaced = rerouting.with_weights(
      program.model,
      step.variables(program.model, second[0], frozen),
      uniform / resolved.adapter.atoms,
      batch.features,
      batch.instruction,
    )
    gain = np.mean((replaced.values - batch.targets) ** 2 - (trained_.values - batch.targets) ** 2)
    found = (
      trained["rows"][1]
      if rows == "row"
      else next(
        line
        for line in trained["curves"]
        if line["trial_id"] == trained["rows"][1]["trial_id"] and line["step"] == int(rows[-2:])
      )
    )
    np.testing.assert_allclose(found["routing/gain_uniform"], gain, rtol=1e-3, atol=1e-6)
    moved = 0.5 * np.abs(weights - drawn.routing.weights).sum(-1).mean()
    np.testing.assert_allclose(found["routing/moved_weights"], moved, rtol=1e-3)
    start = (1 / np.square(drawn.routing.weights).sum(-1)).mean()
    np.testing.assert_allclose(found["routing/support_start"], start, rtol=1e-3)
  assert "routing/gain_uniform" not in trained["curves"][0]  # after 10 steps
  # The start is the draw: B is zero. The end is what was trained: it is not.
  for tree, is_zero in zip(calls[-1][:2], (False, True), strict=True):
    lora_b = tree["stack"]["blocks"]["layer_0"]["up"]["branch"]["lora_b"]
    assert (np.abs(lora_b).max() == 0) == is_zero
  # Each seed has its own validation rows; on test rows the error is against noise-free targets.
  assert not np.array_equal(calls[0][3].targets[0], calls[0][3].targets[1])
  error = np.mean((trained_.values - batch.targets) ** 2)
  if len(batch.targets) < regression.ROUTING_ROWS:
    np.testing.assert_allclose(error, trained["rows"][1]["test_mse"], rtol=1e-3)
  noisy = trained["rows"][1]["test_noisy_mse"]
  assert abs(error - trained["rows"][1]["test_mse"]) < abs(error - noisy)
