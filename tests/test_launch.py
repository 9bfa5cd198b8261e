"""The command line: killed, stopped, resumed, with several workers, and with bad input."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import in_process
import pandas as pd
import pytest

ROOT = pathlib.Path(__file__).parents[1]
TINY = [
  "--config=configs/regression.py:runlocal",
  "--config.model.width=16",
  "--config.model.hidden=16",
  "--config.adapter.budget=1024",
  "--config.optimizer.steps=60",
  "--config.eval.every=2",
  "--config.pretrain.steps=40",
  "--config.checkpoint.seconds=0",
  "--config.protocol.search_seeds=(0,)",
  "--config.protocol.final_seeds=(100,101)",
]
COMPARED = ["stage", "arm", "seed", "learning_rate", "validation_mse", "test_mse", "train_loss"]


def command(workdir, data, *more):
  return [
    sys.executable,
    "launch.py",
    *TINY,
    f"--workdir={workdir}",
    f"--config.data.data_dir={data}",
    *more,
  ]


def finish(workdir, data, *more):
  done = subprocess.run(
    command(workdir, data, *more), cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  return done.stderr


def results(workdir):
  rows = pd.read_parquet(workdir / "results.parquet")[COMPARED]
  return rows.sort_values(["stage", "arm", "seed", "learning_rate"]).reset_index(drop=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shared_data):
  workdir = tmp_path_factory.mktemp("launch") / "whole"
  finish(workdir, shared_data, "--sweep", "--workers=1")
  return results(workdir)


def test_two_workers_give_the_results_of_one(whole, tmp_path, shared_data):
  stderr = finish(tmp_path / "run", shared_data, "--sweep", "--workers=2")
  assert "lora/search: done" in stderr and "queryable/final: done" in stderr
  # With one core a matrix product is split differently: float32 rounding over 60 steps.
  pd.testing.assert_frame_equal(results(tmp_path / "run"), whole, rtol=1e-3)


@pytest.mark.parametrize(
  ("sent", "code"),
  [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143), (signal.SIGINT, 130)],
)
def test_a_stopped_study_continues_to_the_same_bits(whole, tmp_path, shared_data, sent, code):
  workdir = tmp_path / "run"
  process = subprocess.Popen(
    command(workdir, shared_data, "--sweep", "--workers=1"),
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  while not list(workdir.glob("cohorts/*/checkpoints/[0-9]*")):  # within a cohort
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.02)
  process.send_signal(sent)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == code, stderr
  assert "Traceback" not in stderr
  finish(workdir, shared_data, "--sweep", "--workers=1")
  pd.testing.assert_frame_equal(results(workdir), whole, check_exact=True)


def refused(*arguments):
  done = in_process.run(["launch.py", *arguments])
  assert done.returncode == 2, done.stderr
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1
  return lines[0]


def test_a_work_directory_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("kept")
  done = subprocess.run(  # for the exit code of the process; `refused` runs in this process
    [sys.executable, "launch.py", *TINY, f"--workdir={tmp_path}/file/run"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2, done.stderr
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("error: --workdir:") and "cannot be written" in line
  assert (tmp_path / "file").read_text() == "kept"


def test_an_empty_list_of_learning_rates_is_named(tmp_path):
  config = tmp_path / "empty.py"
  config.write_text(
    f"import sys; sys.path.insert(0, {str(ROOT / 'configs')!r})\n"
    "from regression import get_config\n"
    "def get_hyper(hyper, arg=None):\n"
    "  return hyper.sweep('optimizer.learning_rate', ())\n"
  )
  line = refused(f"--config={config}", "--sweep", f"--workdir={tmp_path}/run")
  assert "optimizer.learning_rate" in line and not (tmp_path / "run").exists()


def test_a_locked_directory_of_another_config_names_the_field(tmp_path, shared_data):
  workdir = tmp_path / "run"
  done = in_process.run(command(workdir, shared_data, "--config.optimizer.steps=2")[1:])
  assert done.returncode == 0, done.stderr
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  line = refused(*TINY, f"--workdir={workdir}", "--config.optimizer.steps=3")
  assert "optimizer.steps" in line
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (["--config.data.name=missing.jsonl"], "data.name: there is no file missing.jsonl"),
    (["--config.mesh.data=3"], "mesh: slice 1 x data 3 x fsdp -1 x tensor 1 does not fit 1 device"),
  ],
)
def test_an_error_that_is_found_late_leaves_no_work_directory(
  tmp_path, tiny_llama, fields, message
):
  model = f"--config.model.weights={tiny_llama}"
  sizes = ["--config.model.layers_per_block=1", "--config.adapter.budget=2000"]
  run = tmp_path / "run"
  line = refused("--config=configs/llm.py", f"--workdir={run}", model, *sizes, *fields)
  assert message in line and not run.exists()


def test_a_bad_value_deep_in_a_study_is_reported_before_training(tmp_path):
  config = tmp_path / "late.py"
  config.write_text(
    f"import sys; sys.path.insert(0, {str(ROOT / 'configs')!r})\n"
    "from regression import get_config\n"
    "def get_hyper(hyper, arg=None):\n"
    "  return hyper.sweep('adapter.top_k', (2, 10 ** 6))\n"
  )
  line = refused(f"--config={config}", "--sweep", f"--workdir={tmp_path}/run")
  assert line.startswith("error: adapter.top_k: 1000000")
  assert not list((tmp_path / "run").glob("cohorts/*"))


def test_a_dry_run_prints_every_trial_and_writes_nothing(tmp_path):
  done = subprocess.run(
    [sys.executable, "launch.py", *TINY, "--sweep", "--dry_run"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
    env={**os.environ, "HOME": str(tmp_path)},
  )
  lines = done.stdout.strip().splitlines()
  points = [line for line in lines if "trainable parameters" in line]
  assert len(points) == 4  # two methods, two learning rates
  assert set(lines) - set(points) == {
    "protocol: too few learning rates: 2, at least 7 asked (lora, queryable)",
    "protocol: learning rates too close together: 0.52 decades, at least 2 asked (lora, queryable)",
    "protocol: too few seeds: 2, at least 10 asked (lora, queryable)",
  }
  assert not list(tmp_path.iterdir())
