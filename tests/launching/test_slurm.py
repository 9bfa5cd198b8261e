"""Studies on real Slurm with one node: submission, preemption, resumption, results, failures."""

import json
import pathlib
import subprocess
import sys
import time

import pandas as pd
import pytest

from configs import llm, regression
from experiments import report
from qlora_jax import errors
from qlora_jax.launching import options, slurm, status
from qlora_jax.studies import records, study
from qlora_jax.studies import workdir as workdir_lib

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ROOT = pathlib.Path(__file__).parents[2]
COMPARED = ["stage", "arm", "seed", "learning_rate", "validation_mse", "test_mse", "train_loss"]


def regression_config(data):
  config = regression.get_config("runlocal")
  config.data.data_dir = str(data)
  config.model.update(dict(width=16, hidden=16))
  config.adapter.budget = 1024
  config.optimizer.steps, config.pretrain.steps, config.eval.every = 120, 40, 2
  config.checkpoint.seconds = 0.0
  config.protocol.search_seeds, config.protocol.final_seeds = (0,), (100,)
  return options.split(config)


def launch(config, points, workdir, cluster, **overrides):
  return slurm.launch(
    config,
    points,
    workdir,
    cluster.slurm,
    "test",
    **{"max_parallel": None, "report": report.write_report, **overrides},
  )


def until(condition, workdir, seconds=900):
  """Polls until `condition(rows)`; returns the rows, or fails with rows and logs."""
  ends = time.monotonic() + seconds
  while time.monotonic() < ends:
    rows = status.look(workdir)
    if condition(rows):
      return rows
    time.sleep(0.1)
  logs = [path.read_text()[-2000:] for path in sorted(workdir.glob("slurm/*_log.err"))]
  raise AssertionError("\n".join([*map(str, rows), *logs]))


def states(rows):
  return [row.state for row in rows]


def saves(workdir):
  return list(workdir.glob("cohorts/*/checkpoints/[0-9]*"))


def test_a_sweep_is_one_array_that_survives_preemption_and_resubmits_what_failed(
  slurm, tmp_path, shared_data
):
  config, cluster = regression_config(shared_data)
  cluster.slurm.requeues = 3
  points = [
    # The folder of the data cannot be created; the error appears only in the job.
    {"adapter.name": "static", "data.data_dir": "/dev/null/data"},
    {"adapter.name": "lora"},
    {"adapter.name": "none"},
  ]
  workdir = tmp_path / "sweep"
  message, _ = launch(config, points, workdir, cluster, max_parallel=1)
  assert "submitted 3 of 3 arms" in message
  until(lambda rows: rows[0].state == "running", workdir)
  assert states(status.look(workdir))[1:] == ["pending", "pending"]  # one at a time

  rows = until(lambda rows: rows[0].state == "failed" and saves(workdir), workdir)
  assert rows[0].reason.startswith("NotADirectoryError: [Errno 20]")
  assert states(rows) == ["failed", "running", "pending"]
  assert rows[2].reason == "waits for other jobs of the study (--max_parallel)"
  lora = rows[1].job
  array = lora.split("_")[0]
  assert [row.job for row in rows] == [f"{array}_{index}" for index in range(3)]

  # The signal before a time limit; a training treats SIGTERM in the grace time the same way.
  subprocess.run(["scancel", "--signal=USR2", lora], check=True)
  log = workdir / f"slurm/{lora}_0_log.err"
  until(lambda rows: "requeued" in log.read_text(), workdir)
  assert "stopped by SIGUSR2 after saving" in log.read_text()
  assert f"job {lora} requeued: it continues from its checkpoint" in log.read_text()

  page = workdir / "report/report.html"  # the last job writes it
  rows = until(
    lambda rows: (
      states(rows) == ["failed", "done", "done"] and page.exists() and page.stat().st_size > 10_000
    ),
    workdir,
  )
  assert rows[1].job == lora  # the same job
  record = records.read(workdir, rows[1].arm)
  trained = workdir / "cohorts" / record.cohorts[0]  # one learning rate: no search
  lines = (trained / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == list(range(2, 121, 2))  # each step once
  assert "lora/final: 1 trial, 120 steps, from step " in log.read_text()

  local = tmp_path / "local"
  workdir_lib.prepare(local, config, "test")
  study.run(config, points[1:], local)
  tables = [pd.read_parquet(folder / "results.parquet")[COMPARED] for folder in (workdir, local)]
  pd.testing.assert_frame_equal(*tables, rtol=1e-3)  # float32 with another number of threads

  message, finished = launch(config, points, workdir, cluster)
  assert "submitted 1 of 3 arms" in message and "2 done, 0 in the queue" in message and finished
  message, _ = launch(config, points, workdir, cluster)
  assert message == "nothing to submit: of 3 arms 2 done, 1 in the queue"
  again = status.look(workdir)[0].job
  subprocess.run(["scancel", again], check=True)
  rows = until(lambda rows: not rows[0].queued, workdir)
  assert rows[0].state == "failed" and rows[0].reason.startswith("cancelled")
  assert records.read(workdir, rows[0].arm).job != again  # cancelled, not requeued


def test_a_preempted_job_continues_after_the_job_of_higher_priority(slurm, tmp_path, shared_data):
  config, cluster = regression_config(shared_data)
  config.adapter.name = "lora"
  config.optimizer.steps = 400
  cluster.slurm.cpus_per_task = 4  # all cores of the node, so that no other job fits
  workdir = tmp_path / "run"
  launch(config, None, workdir, cluster)
  job = until(lambda rows: rows[0].state == "running" and saves(workdir), workdir)[0].job
  log = workdir / f"slurm/{job}_0_log.err"
  done = tmp_path / "urgent"
  subprocess.run(
    ["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", f"--wrap=touch {done}"],
    check=True,
  )
  until(lambda rows: "after saving" in log.read_text(), workdir)
  assert "stopped by SIGTERM after saving" in log.read_text()
  rows = until(lambda rows: rows[0].state in ("done", "failed"), workdir)
  assert done.exists()  # the other job did run
  assert rows[0].state == "done", rows[0].reason
  assert rows[0].job == job  # the same job
  record = records.read(workdir, rows[0].arm)
  lines = (workdir / "cohorts" / record.cohorts[0] / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == list(range(2, 401, 2))  # each step once
  assert "lora/final: 1 trial, 400 steps, from step " in log.read_text()


def test_two_tasks_of_a_job_find_each_other_and_train_one_model(slurm, tmp_path, tiny_llama):
  config = llm.get_config()
  config.model.weights, config.model.layers_per_block = str(tiny_llama), 1
  config.adapter.name, config.adapter.rank, config.adapter.atoms = "lora", 4, 4
  config.optimizer.update({"steps": 4, "batch_size": 4})
  config.data.tasks, config.data.train_rows, config.data.length = ("plural",), 12, 64
  config.data.data_dir = str(tmp_path / "data")
  config.eval.update({"every": 2, "validation": 4, "examples": 1, "max_tokens": 1, "batch_size": 1})
  config.mesh.fsdp = 2
  config, cluster = options.split(config)
  cluster.slurm.tasks_per_node = 2
  workdir = tmp_path / "run"
  message, _ = launch(config, None, workdir, cluster)
  assert "submitted 1 of 1 arms" in message
  rows = until(lambda rows: rows[0].state in ("done", "failed"), workdir)
  assert rows[0].state == "done", rows[0].reason
  assert (workdir / "adapter").is_dir()
  logs = [workdir / f"slurm/{rows[0].job}_{rank}_log.out" for rank in (0, 1)]
  until(lambda _: all("completed successfully" in log.read_text() for log in logs), workdir)
  done = subprocess.run(
    [sys.executable, "launch.py", "--status", f"--workdir={workdir}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert "word_tasks/lora" in done.stdout
  assert "1 arms: 0 pending, 0 running, 1 done, 0 failed" in done.stdout


def test_an_error_of_sbatch_is_one_line_and_leaves_no_job(slurm, tmp_path, shared_data):
  config, cluster = regression_config(shared_data)
  cluster.slurm.partition = "absent"
  with pytest.raises(errors.UserError, match=r"sbatch refused: .*[Ii]nvalid partition"):
    launch(config, None, tmp_path / "run", cluster)
  assert not list((tmp_path / "run/slurm").iterdir())
  assert states(status.look(tmp_path / "run")) == ["pending"]
