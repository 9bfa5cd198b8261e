"""The status of the arms of a work directory: from files, from Slurm, and for local training."""

import errno
import io
import os
import pathlib
import subprocess
import sys

import pytest
import rich.console

from qlora_jax import errors
from qlora_jax.launching import status, task
from qlora_jax.studies import records, study
from qlora_jax.training import stop

ROOT = pathlib.Path(__file__).parents[2]
ARM = records.Arm("k1", "adapter.name=lora", 3)
OTHER = records.Arm("k2", "adapter.name=none", 2)


def train(workdir, end=None, cohorts=(), key="k1"):
  """Writes the files of a trained arm, as `study` does; raises `end` if it is given."""
  with records.kept(workdir, key, "cpu") as keeper:
    for cohort in cohorts:
      keeper.start(cohort, 60)
      folder = workdir / "cohorts" / cohort
      folder.mkdir(parents=True, exist_ok=True)
      (folder / "metrics.jsonl").write_text('{"step": 20}\n{"step": 40}\n{"st')
      if end is None:
        (folder / "result.json").write_text("{}")
        keeper.result(cohort)
    if end is not None:
      raise end


@pytest.fixture
def workdir(tmp_path, monkeypatch):
  monkeypatch.delenv("SLURM_JOB_ID", raising=False)
  monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
  records.write_list(tmp_path, [ARM])
  return tmp_path


def only(workdir):
  (row,) = status.look(workdir)
  return row


def test_a_local_arm_is_pending_then_running_then_done(workdir):
  assert (only(workdir).state, only(workdir).reason) == ("pending", "not started")
  with records.kept(workdir, "k1") as keeper:
    (workdir / "cohorts/g1").mkdir(parents=True)
    (workdir / "cohorts/g1/metrics.jsonl").write_text('{"step": 20}\n{"step": 40}\n{"st')
    keeper.start("g1", 60)
    assert (only(workdir).state, only(workdir).reason) == ("running", "search, step 40 of 60")
    (workdir / "cohorts/g1/result.json").write_text("{}")
    keeper.result("g1")
    keeper.start("g2", 60)
    assert only(workdir).reason == "final trials, step 0 of 60"
  assert only(workdir).state == "done" and only(workdir).reason.startswith("took 0:00:")
  (workdir / "cohorts/g1/result.json").unlink()
  assert only(workdir).state == "pending"


@pytest.mark.parametrize(
  ("end", "state", "reason"),
  [
    (errors.UserError("data.x: bad; use good"), "failed", "data.x: bad; use good"),
    (ValueError("first line\nsecond"), "failed", "ValueError: first line"),
    (MemoryError(), "failed", "MemoryError"),
    (stop.Stopped(15), "pending", "stopped by SIGTERM after saving; the same command continues"),
    (KeyboardInterrupt(), "pending", "interrupted; the same command continues"),
  ],
)
def test_the_end_of_a_local_arm_is_its_reason(workdir, end, state, reason):
  with pytest.raises(type(end)):
    train(workdir, end, ["g1"])
  assert (only(workdir).state, only(workdir).reason) == (state, reason)


def test_a_killed_process_is_lost_and_one_on_another_host_counts_as_running(workdir, monkeypatch):
  code = (
    "import os, pathlib, sys\n"
    "from qlora_jax.studies import records\n"
    "with records.kept(pathlib.Path(sys.argv[1]), 'k1') as keeper:\n"
    "  keeper.start('g1', 60)\n"
    "  os._exit(1)\n"
  )
  subprocess.run([sys.executable, "-c", code, str(workdir)], cwd=ROOT, check=False)
  assert only(workdir).state == "failed" and "ended without a message" in only(workdir).reason
  monkeypatch.setattr(records.socket, "gethostname", lambda: "elsewhere")
  assert only(workdir).state == "running" and "according to its files" in only(workdir).reason


def slurm_says(workdir, monkeypatch, squeue="", sacct="", job="7_0"):
  """Puts stand-ins for squeue and sacct on the path."""
  (workdir / "slurm").mkdir(exist_ok=True)
  status.write_jobs(workdir, {"k1": job})
  folder = workdir / "bin"
  folder.mkdir(exist_ok=True)
  for name, output in (("squeue", squeue), ("sacct", sacct)):
    (folder / name).write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    (folder / name).chmod(0o755)
  monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
  ("squeue", "sacct", "state", "reason", "queued"),
  [
    ("7_0|PENDING|Priority", "", "pending", "waits for jobs of higher priority", True),
    ("7_0|PENDING|QOSMaxJobs", "", "pending", "QOSMaxJobs", True),
    ("7_0|RUNNING|None", "", "running", "starts", True),
    ("7_0|TIMEOUT|TimeLimit", "", "failed", "over its time limit", False),
    ("7_1|RUNNING|None", "7_0|OUT_OF_MEMORY|0:125", "failed", "out of memory", False),
    ("", "7_0|CANCELLED by 1000|0:0", "failed", "cancelled", False),
    ("", "7_0|NODE_FAIL|1:0", "failed", "its node failed", False),
    ("", "", "failed", "lost: Slurm no longer knows job 7_0", False),
  ],
)
def test_slurms_states_have_reasons(workdir, monkeypatch, squeue, sacct, state, reason, queued):
  slurm_says(workdir, monkeypatch, squeue, sacct)
  row = only(workdir)
  assert (row.state, row.queued, row.job) == (state, queued, "7_0")
  assert row.reason.startswith(reason)


def test_a_lost_job_shows_the_last_line_of_its_log(workdir, monkeypatch):
  slurm_says(workdir, monkeypatch)
  (workdir / "slurm/7_0_0_log.err").write_text(
    "submitit INFO Starting\nslurmstepd: error: Detected 1 oom_kill event\nsrun: error: vm\n"
  )
  assert only(workdir).reason.endswith("its log ends: slurmstepd: error: Detected 1 oom_kill event")


def test_a_requeued_job_is_pending_and_a_failed_one_shows_its_reason(workdir, monkeypatch):
  monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
  monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
  with pytest.raises(stop.Stopped):
    train(workdir, stop.Stopped(12), ["g1"])
  slurm_says(workdir, monkeypatch, "7_0|PENDING|BeginTime")
  assert only(workdir).reason.startswith("requeued, continues from its checkpoint")
  with pytest.raises(ValueError):
    train(workdir, ValueError("why"), ["g1"])
  slurm_says(workdir, monkeypatch, "7_0|COMPLETING|None")
  assert (only(workdir).state, only(workdir).reason) == ("failed", "ValueError: why")
  slurm_says(workdir, monkeypatch, "8|PENDING|None", job="8")  # submitted again
  assert (only(workdir).state, only(workdir).reason) == ("pending", "in the queue")


def test_the_table_has_a_line_per_arm_and_the_counts(workdir):
  records.write_list(workdir, [ARM, OTHER])
  train(workdir, cohorts=["g1"], key="k2")
  text = io.StringIO()
  status.show(workdir, rich.console.Console(file=text))
  lines = text.getvalue().splitlines()
  assert lines[0].split() == ["arm", "trials", "state", "job", "reason"]
  assert lines[1].split()[:3] == ["adapter.name=lora", "3", "pending"]
  assert lines[2].split()[:3] == ["adapter.name=none", "2", "done"]
  assert lines[-1] == "2 arms: 1 pending, 0 running, 1 done, 0 failed"


def test_a_directory_without_a_study_is_named(tmp_path):
  with pytest.raises(errors.UserError, match="holds no run"):
    status.look(tmp_path)


@pytest.mark.parametrize(
  ("state", "restarts", "limit", "message"),
  [
    ("COMPLETING", "0", 9, "Slurm is already ending job 7_0: not requeued"),
    ("RUNNING", "3", 3, "requeued 3 times already"),
    ("RUNNING", "2", 3, "job 7_0 requeued"),
  ],
)
def test_a_job_requeues_itself_only_while_it_runs_and_up_to_a_limit(
  workdir, monkeypatch, state, restarts, limit, message
):
  slurm_says(workdir, monkeypatch, state)
  calls = workdir / "calls"
  (workdir / "bin/scontrol").write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
  (workdir / "bin/scontrol").chmod(0o755)
  monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
  monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
  monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
  assert message in task.requeue(limit)
  assert calls.exists() == (state == "RUNNING" and int(restarts) < limit)
  if calls.exists():
    assert calls.read_text() == "requeue 7_0\n"


def test_a_full_disk_ends_a_job_with_one_line(tmp_path, monkeypatch, capsys):
  def full(config, workdir):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(workdir / "results.csv"))

  monkeypatch.setattr(study, "single", full)
  monkeypatch.setattr(stop, "install", lambda **options: None)
  with pytest.raises(SystemExit) as end:
    task.Task(tmp_path, None, None, 0)()
  assert end.value.code == 2
  assert capsys.readouterr().err == (
    f"error: --workdir: {tmp_path}/results.csv cannot be written (No space left on device); make"
    " room: the same command continues from the last checkpoint\n"
  )


def test_arms_are_named_by_the_fields_that_differ():
  points = [
    {"data.task": "sines", "adapter.name": name, "optimizer.learning_rate": rate}
    for name in ("lora", "none")
    for rate in (1e-3, 1e-2)
  ]
  assert records.names(points) == ["adapter.name=lora", "adapter.name=none"]
  assert records.names([{"optimizer.learning_rate": 1e-3}]) == ["the config's own"]
