"""The status of every arm of a work directory: pending, running, done or failed, and the reason.

The sources are Slurm's queue, then Slurm's accounting if it exists, then the files of the job:
record, results, last line of the log. For local training they are the files and the process table.
"""

import dataclasses
import datetime
import json
import pathlib
import shutil
import subprocess

import rich.console
import rich.markup
import rich.table

from qlora_jax import files
from qlora_jax.studies import records

STATES = ("pending", "running", "done", "failed")
SLURM_FOLDER = "slurm"
_JOBS = "jobs.json"
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD")
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING")
_ENDED = {
  "BOOT_FAIL": "the node did not start",
  "CANCELLED": "cancelled",
  "COMPLETED": "ended without a result",
  "DEADLINE": "its deadline passed",
  "FAILED": "ended with an error",
  "NODE_FAIL": "its node failed",
  "OUT_OF_MEMORY": "out of memory; increase cluster.slurm.memory_gb",
  "PREEMPTED": "preempted",
  "TIMEOUT": "over its time limit; increase cluster.slurm.time",
}
_QUEUE_REASONS = {
  "JobArrayTaskLimit": "waits for other jobs of the study (--max_parallel)",
  "Priority": "waits for jobs of higher priority",
  "Resources": "waits for free nodes",
  "BeginTime": "waits for its begin time",
  "None": "in the queue",
}
_COLORS = {"pending": "yellow", "running": "cyan", "done": "green", "failed": "red"}


@dataclasses.dataclass(frozen=True)
class Row:
  """Status of one arm.

  Attributes:
    arm: the arm.
    state: one of `STATES`.
    reason: reason of the state, or progress.
    job: id of the Slurm job, or ''.
    queued: whether that job is in Slurm's queue.
  """

  arm: records.Arm
  state: str
  reason: str = ""
  job: str = ""
  queued: bool = False


def show(workdir: pathlib.Path, console: rich.console.Console | None = None) -> None:
  """Prints a table of the arms of `workdir`, and the number of arms per state.

  Raises:
    errors.UserError: `workdir` holds no study.
  """
  rows = look(workdir)
  console = console or rich.console.Console()
  if not console.is_terminal:
    console.width = 200  # a log file has no width
  table = rich.table.Table(box=None, header_style="dim", pad_edge=False)
  table.add_column("arm", overflow="fold")
  table.add_column("trials", justify="right")
  table.add_column("state", no_wrap=True)
  table.add_column("job", no_wrap=True)
  table.add_column("reason", overflow="fold", ratio=1)
  for row in rows:
    name, reason = (rich.markup.escape(text) for text in (row.arm.name, row.reason))
    state = f"[{_COLORS[row.state]}]{row.state}[/]"
    table.add_row(name, str(row.arm.trials), state, row.job, reason)
  console.print(table)
  states = [row.state for row in rows]
  counts = ", ".join(f"{states.count(state)} {state}" for state in STATES)
  console.print(f"{len(rows)} arms: {counts}")


def look(workdir: pathlib.Path) -> list[Row]:
  """The status of the arms of `workdir`, in order.

  Raises:
    errors.UserError: `workdir` holds no study.
  """
  arms, jobs = records.read_list(workdir), read_jobs(workdir)
  arm_records = {arm.key: records.read(workdir, arm) for arm in arms}
  unfinished = {
    jobs[key]
    for key, record in arm_records.items()
    if key in jobs and (record is None or record.state != "done")
  }
  queue = ask_slurm(sorted(unfinished))
  return [_row(workdir, arm, arm_records[arm.key], jobs.get(arm.key), queue) for arm in arms]


def read_jobs(workdir: pathlib.Path) -> dict[str, str]:
  """The Slurm job of each submitted arm, by the arm's key."""
  path = workdir / SLURM_FOLDER / _JOBS
  return json.loads(path.read_text()) if path.exists() else {}


def write_jobs(workdir: pathlib.Path, jobs: dict[str, str]) -> None:
  """Stores the Slurm job of each arm, by the arm's key."""
  files.write_json(workdir / SLURM_FOLDER / _JOBS, jobs, every_process=True)


def ask_slurm(jobs: list[str]) -> dict[str, tuple[str, str]]:
  """(state, reason) of each job that Slurm still knows; empty without Slurm."""
  job_states = _run_for_jobs(
    ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r"], jobs
  )
  not_in_queue = [job for job in jobs if job not in job_states]
  if not_in_queue:
    job_states |= _run_for_jobs(
      ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State,ExitCode"],
      not_in_queue,
    )
  return job_states


def _run_for_jobs(command: list[str], jobs: list[str]) -> dict[str, tuple[str, str]]:
  if not jobs or shutil.which(command[0]) is None:
    return {}
  ids = ",".join(sorted({job.split("_")[0] for job in jobs}, key=int))
  done = subprocess.run(
    [*command, f"--jobs={ids}"], capture_output=True, text=True, check=False, timeout=60
  )
  job_states = {}
  # For an unknown id, or without accounting, the command prints nothing and fails.
  for line in done.stdout.splitlines():
    job, _, rest = line.partition("|")
    state, _, reason = rest.partition("|")
    job_states[job.strip()] = (state.split()[0].strip("+") if state else "", reason.strip())
  return {job: job_states[job] for job in jobs if job in job_states}


def _row(workdir, arm, record, job, queue) -> Row:
  if record is not None and record.state == "done":
    return Row(arm, "done", _duration(record), record.job or "")
  if record is not None and record.job is None and (job is None or records.alive(record)):
    return Row(arm, *_local(workdir, record))
  if job is None:
    return Row(arm, "pending", "not started")
  state, reason = queue.get(job, ("", ""))
  # A record of an earlier job says nothing about the current one.
  job_record = record if record is not None and record.job == job else None
  if state in _WAITING:
    wait = _QUEUE_REASONS.get(reason, reason)
    if job_record is not None:
      wait = f"requeued, continues from its checkpoint ({wait})"
    return Row(arm, "pending", wait, job, True)
  if job_record is not None and job_record.state == "failed":
    return Row(arm, "failed", job_record.reason, job)
  if state in _RUNNING:
    started = job_record is not None and job_record.state == "running"
    progress = _progress(workdir, job_record) if started else "starts"
    return Row(arm, "running", progress, job, True)
  cause = _ENDED.get(state, f"lost: Slurm no longer knows job {job}, and it left no result")
  if job_record is not None and job_record.state == "stopped":
    cause += f"; {job_record.reason}"
  else:
    line = last_line(workdir, job)
    cause += f"; its log ends: {line}" if line else f"; no log in {workdir / SLURM_FOLDER}"
  return Row(arm, "failed", cause, job)


def _local(workdir: pathlib.Path, record: records.Record) -> tuple[str, str]:
  if record.state == "failed":
    return "failed", record.reason
  if record.state == "stopped":
    return "pending", f"{record.reason}; the same command continues"
  alive = records.alive(record)
  process = f"process {record.pid} on {record.host}"
  if alive is None:
    return "running", f"{process}, according to its files; {_progress(workdir, record)}"
  if alive:
    return "running", _progress(workdir, record)
  return "failed", f"lost: {process} ended without a message; the same command continues"


def last_line(workdir: pathlib.Path, job: str) -> str:
  """The last line of a job's log, if possible one that srun and submitit did not write."""
  path = workdir / SLURM_FOLDER / f"{job}_0_log.err"
  if not path.exists():
    return ""
  with path.open("rb") as handle:
    handle.seek(max(0, path.stat().st_size - 4096))
    text = handle.read().decode(errors="replace")
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  informative = [line for line in lines if not line.startswith(("srun:", "submitit "))]
  return (informative or lines or [""])[-1]


def _progress(workdir: pathlib.Path, record: records.Record) -> str:
  stage = "final trials" if record.cohorts else "search"
  folder = workdir / records.COHORTS / record.cohort
  # Files of one process, or of each of several. A recursive search would fail if the training
  # removes a folder meanwhile.
  paths = [path for pattern in ("", "*/") for path in folder.glob(f"{pattern}metrics.jsonl")]
  step = max((_last_step(path) for path in paths), default=0)
  return f"{stage}, step {step} of {record.steps}"


def _last_step(path: pathlib.Path) -> int:
  with path.open("rb") as handle:
    handle.seek(max(0, path.stat().st_size - 4096))
    lines = handle.read().decode(errors="replace").splitlines()
  for line in reversed(lines):
    try:
      return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # an incomplete line
      continue
  return 0


def _duration(record: records.Record) -> str:
  began, ended = (datetime.datetime.fromisoformat(text) for text in (record.began, record.ended))
  return f"took {ended - began}"
