"""Submits to Slurm: a sweep as one job array, a training of several processes as one job."""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
import submitit

from qlora_jax import errors, files
from qlora_jax.launching import options, status, task
from qlora_jax.studies import records, study
from qlora_jax.studies import workdir as workdir_lib

ROOT = pathlib.Path(__file__).parents[2]


class _Executor(submitit.SlurmExecutor):
  """submitit's, which also writes scripts on a machine without Slurm."""

  @classmethod
  def affinity(cls) -> int:
    return 1


def make_executor(
  folder: pathlib.Path, slurm: ml_collections.ConfigDict, name: str, max_parallel: int | None
) -> submitit.SlurmExecutor:
  """submitit's executor with the config's options.

  Args:
    folder: of scripts, pickled jobs and logs; all nodes see it.
    slurm: the config's `cluster.slurm`.
    name: of the jobs.
    max_parallel: jobs of an array that run at a time; None lets Slurm decide.
  """
  options.check_slurm(slurm)
  executor = _Executor(folder)
  more: dict[str, Any] = {"requeue": True}
  for option in slurm.sbatch:
    key, _, value = option.removeprefix("--").partition("=")
    more[key] = value or True
  executor.update_parameters(
    job_name=re.sub(r"[^\w.-]", "_", name) or "qlora_jax",
    time=options.minutes(slurm.time),
    nodes=slurm.nodes,
    ntasks_per_node=slurm.tasks_per_node,
    cpus_per_task=slurm.cpus_per_task,
    gpus_per_node=slurm.gpus_per_node or None,
    mem=None if slurm.memory_gb is None else f"{round(slurm.memory_gb * 1024)}M",
    partition=slurm.partition,
    account=slurm.account,
    qos=slurm.qos,
    constraint=slurm.constraint,
    signal_delay_s=slurm.signal_seconds,
    array_parallelism=max_parallel or 1_000_000,
    setup=[f"export PYTHONPATH={json.dumps(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}", *slurm.setup],
    # Since 22.05 srun does not take this from sbatch.
    srun_args=[f"--cpus-per-task={slurm.cpus_per_task}"],
    wckey=None,
    additional_parameters=more,
  )
  return executor


def script(executor: submitit.SlurmExecutor, count: int) -> str:
  """What sbatch would be given for `count` jobs."""
  shown = _Executor(executor.folder)
  shown.update_parameters(**executor.parameters)
  if count > 1:
    shown.parameters["map_count"] = count
  return shown._make_submission_file_text(shown._submitit_command_str, "")


def launch(
  config: ml_collections.ConfigDict,
  points: list[dict] | None,
  workdir: pathlib.Path,
  slurm: ml_collections.ConfigDict,
  command: str,
  max_parallel: int | None,
  report: Callable[[pathlib.Path], Any],
) -> tuple[str, bool]:
  """Submits what is left of a sweep or run, and writes the tables of what is done.

  Args:
    config: without the group `cluster`.
    points: of a sweep; None for the config's own run.
    workdir: a directory that all nodes see.
    slurm: the config's `cluster.slurm`.
    command: what the user gave, for the records.
    max_parallel: see `make_executor`.
    report: called with `workdir` by the job that ends last.

  Returns:
    Lines about it, and whether there are final results to report.

  Raises:
    errors.UserError: no Slurm here, an option is wrong, or sbatch refused.
  """
  options.require_slurm()
  pairs = check(config, points, slurm)
  workdir_lib.prepare(workdir, config, command)
  arms = [study.describe_single(config)] if points is None else study.describe(config, points)
  records.write_list(workdir, arms)
  told = submit(workdir, tasks(workdir, pairs, slurm, report), slurm, max_parallel)
  with files.lock(workdir / records.LIST):
    return told, workdir_lib.gather(workdir)


def dry_run(
  config: ml_collections.ConfigDict,
  points: list[dict] | None,
  workdir: str | None,
  slurm: ml_collections.ConfigDict,
  max_parallel: int | None,
) -> str:
  """The script that `launch` would give to sbatch for a fresh work directory."""
  pairs = check(config, points, slurm)
  directory = pathlib.Path(workdir or "runs/slurm")
  folder = (directory / status.SLURM_FOLDER).absolute()
  return script(make_executor(folder, slurm, directory.name, max_parallel), len(pairs))


def check(
  config: ml_collections.ConfigDict, points: list[dict] | None, slurm: ml_collections.ConfigDict
) -> list[tuple]:
  """(config, learning rates) of every job, rates None for a single run.

  Raises:
    errors.UserError: an arm or an option of Slurm is wrong.
  """
  options.check_slurm(slurm)
  pairs = [(config, None)] if points is None else study.expand(config, points)
  for own, _ in pairs:
    study.resolve(own)
  count = slurm.nodes * slurm.tasks_per_node
  if count > 1 and not study.is_language(config):
    raise errors.UserError(
      f"cluster.slurm.tasks_per_node: {count} processes, but a regression trains in one;"
      " use nodes=1 and tasks_per_node=1"
    )
  return pairs


def submit(
  workdir: pathlib.Path,
  jobs_of: dict[str, task.Task],
  slurm: ml_collections.ConfigDict,
  max_parallel: int | None = None,
) -> str:
  """Submits the tasks whose arms are neither done nor in the queue.

  Args:
    workdir: prepared; its list of arms is written.
    jobs_of: tasks by the key of their arm.
    slurm: the config's `cluster.slurm`.
    max_parallel: see `make_executor`.

  Returns:
    Lines about it.

  Raises:
    errors.UserError: no Slurm here, an option is wrong, or sbatch refused.
  """
  options.require_slurm()
  folder = workdir / status.SLURM_FOLDER
  executor = make_executor(folder.absolute(), slurm, workdir.name, max_parallel)
  rows = status.look(workdir)
  states = [row.state for row in rows]
  queued = sum(row.queued for row in rows)
  left = [row.arm.key for row in rows if row.state != "done" and not row.queued]
  told = f"{states.count('done')} done, {queued} in the queue"
  if not left:
    return f"nothing to submit: of {len(rows)} arms {told}"
  jobs = _sbatch(executor, folder, [jobs_of[key] for key in left])
  submitted = {key: job.job_id for key, job in zip(left, jobs, strict=True)}
  status.write_jobs(workdir, {**status.read_jobs(workdir), **submitted})
  first = jobs[0].job_id.split("_")[0]
  return (
    f"submitted {len(left)} of {len(rows)} arms as job {first} ({told}); logs: {folder}\n"
    f"python launch.py --status --workdir={workdir}"
  )


def _sbatch(
  executor: submitit.SlurmExecutor, folder: pathlib.Path, tasks: list[task.Task]
) -> list[submitit.Job]:
  before = set(folder.glob("*"))
  try:
    with _outside():
      return executor.map_array(task.Task.__call__, tasks)
  except submitit.core.utils.FailedJobError as error:
    for path in set(folder.glob("*")) - before:
      path.unlink()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = (lines or ["it gave no reason"])[-1].removeprefix("sbatch: error: ")
    raise errors.UserError(
      f"cluster.slurm: sbatch refused: {said}; `sinfo` shows what there is"
    ) from error


@contextlib.contextmanager
def _outside() -> Iterator[None]:
  """Hides the Slurm job that this process is in, if any: a new job would take over its shape."""
  if "SLURM_JOB_ID" not in os.environ:
    yield
    return
  kept = os.environ.get("SLURM_CONF")
  with submitit.helpers.clean_env():
    if kept:
      os.environ["SLURM_CONF"] = kept
    yield


def tasks(
  workdir: pathlib.Path, pairs: list[tuple], slurm: ml_collections.ConfigDict, report: Any
) -> dict[str, task.Task]:
  """A task for each of the pairs of `check`, by the key of its arm."""
  found = {}
  for own, rates in pairs:
    key = study.describe_single(own).key if rates is None else records.key(own, rates)
    found[key] = task.Task(workdir.absolute(), own, rates, slurm.requeues, report)
  return found
