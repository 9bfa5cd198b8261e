"""What every arm of a work directory is doing: pending, running, done or failed, and why.

Asks Slurm's queue, then its accounting where there is any, then the files that a job left: its
record, its results, the last line of its log. For a local run the files and the process table say.
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
  "OUT_OF_MEMORY": "out of memory; give it more with cluster.slurm.memory_gb",
  "PREEMPTED": "preempted",
  "TIMEOUT": "over its time limit; give it more with cluster.slurm.time",
}
_QUEUE_REASONS = {
  "JobArrayTaskLimit": "waits for others of the sweep (--max_parallel)",
  "Priority": "waits for jobs of higher priority",
  "Resources": "waits for free nodes",
  "BeginTime": "waits for its begin time",
  "None": "in the queue",
}
_COLORS = {"pending": "yellow", "running": "cyan", "done": "green", "failed": "red"}


@dataclasses.dataclass(frozen=True)
class Row:
  """An arm, one of `STATES`, why or how far, its job, and whether that is in the queue."""

  arm: records.Arm
  state: str
  reason: str = ""
  job: str = ""
  queued: bool = False


def show(workdir: pathlib.Path, console: rich.console.Console | None = None) -> None:
  """Prints a table of the arms of `workdir`, and how many are in which state."""
  rows = look(workdir)
  console = console or rich.console.Console()
  if not console.is_terminal:
    console.width = 200  # a log file has no width of its own
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
  """The arms of `workdir`, in order.

  Raises:
    errors.UserError: it holds no run.
  """
  arms, jobs = records.read_list(workdir), read_jobs(workdir)
  known = {arm.key: records.read(workdir, arm) for arm in arms}
  unclear = {
    jobs[key]
    for key, record in known.items()
    if key in jobs and (record is None or record.state != "done")
  }
  queue = ask_slurm(sorted(unclear))
  return [_row(workdir, arm, known[arm.key], jobs.get(arm.key), queue) for arm in arms]


def read_jobs(workdir: pathlib.Path) -> dict[str, str]:
  """The Slurm job of each arm that was submitted, by key."""
  path = workdir / SLURM_FOLDER / _JOBS
  return json.loads(path.read_text()) if path.exists() else {}


def write_jobs(workdir: pathlib.Path, jobs: dict[str, str]) -> None:
  """Stores the Slurm job of each arm."""
  files.write_json(workdir / SLURM_FOLDER / _JOBS, jobs, every_process=True)


def ask_slurm(jobs: list[str]) -> dict[str, tuple[str, str]]:
  """(state, reason) of jobs, as far as Slurm still knows them; nothing without Slurm."""
  found = _run_for_jobs(
    ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r"], jobs
  )
  forgotten = [job for job in jobs if job not in found]
  if forgotten:
    found |= _run_for_jobs(
      ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State,ExitCode"],
      forgotten,
    )
  return found


def _run_for_jobs(command: list[str], jobs: list[str]) -> dict[str, tuple[str, str]]:
  if not jobs or shutil.which(command[0]) is None:
    return {}
  ids = ",".join(sorted({job.split("_")[0] for job in jobs}, key=int))
  done = subprocess.run(
    [*command, f"--jobs={ids}"], capture_output=True, text=True, check=False, timeout=60
  )
  found = {}
  for line in done.stdout.splitlines():  # an unknown id or no accounting: nothing, and an error
    job, _, rest = line.partition("|")
    state, _, reason = rest.partition("|")
    found[job.strip()] = (state.split()[0].strip("+") if state else "", reason.strip())
  return {job: found[job] for job in jobs if job in found}


def _row(workdir, arm, record, job, queue) -> Row:
  if record is not None and record.state == "done":
    return Row(arm, "done", _duration(record), record.job or "")
  if record is not None and record.job is None and (job is None or records.alive(record)):
    return Row(arm, *_local(workdir, record))
  if job is None:
    return Row(arm, "pending", "not started")
  state, reason = queue.get(job, ("", ""))
  own = record if record is not None and record.job == job else None
  if state in _WAITING:
    told = _QUEUE_REASONS.get(reason, reason)
    if own is not None:
      told = f"requeued, goes on from its checkpoint ({told})"
    return Row(arm, "pending", told, job, True)
  if own is not None and own.state == "failed":
    return Row(arm, "failed", own.reason, job)
  if state in _RUNNING:
    started = own is not None and own.state == "running"
    return Row(arm, "running", _progress(workdir, own) if started else "starts", job, True)
  why = _ENDED.get(state, f"lost: Slurm no longer knows job {job}, and it left no result")
  if own is not None and own.state == "stopped":
    why += f"; {own.reason}"
  else:
    line = last_line(workdir, job)
    why += f"; its log ends: {line}" if line else f"; no log in {workdir / SLURM_FOLDER}"
  return Row(arm, "failed", why, job)


def _local(workdir: pathlib.Path, record: records.Record) -> tuple[str, str]:
  if record.state == "failed":
    return "failed", record.reason
  if record.state == "stopped":
    return "pending", f"{record.reason}; the same command continues"
  alive = records.alive(record)
  where = f"process {record.pid} on {record.host}"
  if alive is None:
    return "running", f"{where}, as far as its files say; {_progress(workdir, record)}"
  if alive:
    return "running", _progress(workdir, record)
  return "failed", f"lost: {where} ended without a word; the same command continues"


def last_line(workdir: pathlib.Path, job: str) -> str:
  """The last line of a job's log that says something about its end."""
  path = workdir / SLURM_FOLDER / f"{job}_0_log.err"
  if not path.exists():
    return ""
  with path.open("rb") as handle:
    handle.seek(max(0, path.stat().st_size - 4096))
    text = handle.read().decode(errors="replace")
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  telling = [line for line in lines if not line.startswith(("srun:", "submitit "))]
  return (telling or lines or [""])[-1]


def _progress(workdir: pathlib.Path, record: records.Record) -> str:
  stage = "final trials" if record.cohorts else "search"
  folder = workdir / records.COHORTS / record.cohort
  # Of one process, or of each of several; what a training removes meanwhile is not looked at.
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
    except (ValueError, KeyError, TypeError):  # a line that is being written
      continue
  return 0


def _duration(record: records.Record) -> str:
  began, ended = (datetime.datetime.fromisoformat(at) for at in (record.began, record.ended))
  return f"took {ended - began}"
