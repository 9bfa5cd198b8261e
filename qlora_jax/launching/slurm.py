"""Submits to Slurm: a study as one job array, a training of several processes as one job."""

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
  """submitit's executor, which can also write scripts on a machine without Slurm."""

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
    max_parallel: maximum number of simultaneous jobs of an array; None lets Slurm decide.

  Raises:
    errors.UserError: an option is invalid.
  """
  options.check_slurm(slurm)
  executor = _Executor(folder)
  extra_options: dict[str, Any] = {"requeue": True}
  for option in slurm.sbatch:
    key, _, value = option.removeprefix("--").partition("=")
    extra_options[key] = value or True
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
    # Since Slurm 22.05 srun does not inherit this from sbatch.
    srun_args=[f"--cpus-per-task={slurm.cpus_per_task}"],
    wckey=None,
    additional_parameters=extra_options,
  )
  return executor


def script(executor: submitit.SlurmExecutor, count: int) -> str:
  """The script that sbatch gets for `count` jobs."""
  copy = _Executor(executor.folder)
  copy.update_parameters(**executor.parameters)
  if count > 1:
    copy.parameters["map_count"] = count
  return copy._make_submission_file_text(copy._submitit_command_str, "")


def launch(
  config: ml_collections.ConfigDict,
  points: list[dict] | None,
  workdir: pathlib.Path,
  slurm: ml_collections.ConfigDict,
  command: str,
  max_parallel: int | None,
  report: Callable[[pathlib.Path], Any],
) -> tuple[str, bool]:
  """Submits the unfinished arms of a study, and writes the tables of the finished ones.

  Args:
    config: without the group `cluster`.
    points: overrides of a sweep, see `study.expand`; None trains the config itself.
    workdir: a directory that all nodes see.
    slurm: the config's `cluster.slurm`.
    command: the user's command, for the records.
    max_parallel: see `make_executor`.
    report: called with `workdir` by the job that ends last.

  Returns:
    A message about the submission, and whether final results exist.

  Raises:
    errors.UserError: Slurm is missing, an option is invalid, or sbatch refused.
  """
  options.require_slurm()
  pairs = check(config, points, slurm)
  workdir_lib.prepare(workdir, config, command)
  arms = [study.describe_single(config)] if points is None else study.describe(config, points)
  records.write_list(workdir, arms)
  message = submit(workdir, tasks(workdir, pairs, slurm, report), slurm, max_parallel)
  with files.lock(workdir / records.LIST):
    return message, workdir_lib.gather(workdir)


def dry_run(
  config: ml_collections.ConfigDict,
  points: list[dict] | None,
  workdir: str | None,
  slurm: ml_collections.ConfigDict,
  max_parallel: int | None,
) -> str:
  """The script that `launch` submits for a new work directory."""
  pairs = check(config, points, slurm)
  directory = pathlib.Path(workdir or "runs/slurm")
  folder = (directory / status.SLURM_FOLDER).absolute()
  return script(make_executor(folder, slurm, directory.name, max_parallel), len(pairs))


def check(
  config: ml_collections.ConfigDict, points: list[dict] | None, slurm: ml_collections.ConfigDict
) -> list[tuple]:
  """(config of the arm, learning rates) of every job; the rates are None for a single trial.

  Raises:
    errors.UserError: an arm or an option of Slurm is invalid.
  """
  options.check_slurm(slurm)
  pairs = [(config, None)] if points is None else study.expand(config, points)
  for arm_config, _ in pairs:
    study.resolve(arm_config)
  count = slurm.nodes * slurm.tasks_per_node
  if count > 1 and not study.is_language(config):
    raise errors.UserError(
      f"cluster.slurm.tasks_per_node: {count} processes, but a regression trains in one;"
      " use nodes=1 and tasks_per_node=1"
    )
  return pairs


def submit(
  workdir: pathlib.Path,
  arm_tasks: dict[str, task.Task],
  slurm: ml_collections.ConfigDict,
  max_parallel: int | None = None,
) -> str:
  """Submits the tasks of the arms that are neither done nor in the queue.

  Args:
    workdir: prepared by `study.prepare`, with its list of arms.
    arm_tasks: tasks by the key of their arm.
    slurm: the config's `cluster.slurm`.
    max_parallel: see `make_executor`.

  Returns:
    A message about the submission.

  Raises:
    errors.UserError: Slurm is missing, an option is invalid, or sbatch refused.
  """
  options.require_slurm()
  folder = workdir / status.SLURM_FOLDER
  executor = make_executor(folder.absolute(), slurm, workdir.name, max_parallel)
  rows = status.look(workdir)
  states = [row.state for row in rows]
  queued = sum(row.queued for row in rows)
  open_keys = [row.arm.key for row in rows if row.state != "done" and not row.queued]
  counts = f"{states.count('done')} done, {queued} in the queue"
  if not open_keys:
    return f"nothing to submit: of {len(rows)} arms {counts}"
  jobs = _sbatch(executor, folder, [arm_tasks[key] for key in open_keys])
  submitted = {key: job.job_id for key, job in zip(open_keys, jobs, strict=True)}
  status.write_jobs(workdir, {**status.read_jobs(workdir), **submitted})
  array_id = jobs[0].job_id.split("_")[0]
  return (
    f"submitted {len(open_keys)} of {len(rows)} arms as job {array_id} ({counts}); logs: {folder}\n"
    f"python launch.py --status --workdir={workdir}"
  )


def _sbatch(
  executor: submitit.SlurmExecutor, folder: pathlib.Path, tasks: list[task.Task]
) -> list[submitit.Job]:
  before = set(folder.glob("*"))
  try:
    with _outside_job():
      return executor.map_array(task.Task.__call__, tasks)
  except submitit.core.utils.FailedJobError as error:
    for path in set(folder.glob("*")) - before:
      path.unlink()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = (lines or ["no reason"])[-1].removeprefix("sbatch: error: ")
    raise errors.UserError(
      f"cluster.slurm: sbatch refused: {reason}; `sinfo` shows partitions and nodes"
    ) from error


@contextlib.contextmanager
def _outside_job() -> Iterator[None]:
  """Hides the Slurm job of this process, if any: a new job would inherit its resources."""
  if "SLURM_JOB_ID" not in os.environ:
    yield
    return
  slurm_conf = os.environ.get("SLURM_CONF")
  with submitit.helpers.clean_env():
    if slurm_conf:
      os.environ["SLURM_CONF"] = slurm_conf
    yield


def tasks(
  workdir: pathlib.Path, pairs: list[tuple], slurm: ml_collections.ConfigDict, report: Any
) -> dict[str, task.Task]:
  """One task per pair of `check`, by the key of its arm."""
  arm_tasks = {}
  for config, rates in pairs:
    key = study.describe_single(config).key if rates is None else records.key(config, rates)
    arm_tasks[key] = task.Task(workdir.absolute(), config, rates, slurm.requeues, report)
  return arm_tasks
