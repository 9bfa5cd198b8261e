"""What a Slurm job runs: one setting of a sweep, or one training; saved and requeued when asked.

Slurm asks with SIGUSR2, `cluster.slurm.signal_seconds` before the time limit, and with SIGTERM when
it preempts or cancels. The loop saves at its next chunk and raises `stop.Stopped`; a job that Slurm
has not ended itself then requeues itself, under the same job id, and goes on from what was saved.
"""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from qlora_jax import errors, files
from qlora_jax.studies import records
from qlora_jax.training import stop


@dataclasses.dataclass
class Task:
  """A picklable job.

  Attributes:
    workdir: prepared by `workdir_lib.prepare`; all nodes see it.
    config: of a setting (without what the sweep varies in learning rate), or of a single run.
    rates: the setting's learning rates; None for a single run.
    requeues: how many times it may be requeued.
    report: called with `workdir` when nothing of a sweep is left to train.
  """

  workdir: pathlib.Path
  config: Any
  rates: list[float] | None
  requeues: int
  report: Callable[[pathlib.Path], Any] | None = None

  def __call__(self) -> str:
    """Trains; returns a line about it. Exits with 143 or 140 if it was stopped and has saved."""
    from qlora_jax.parallel import processes

    processes.start()  # before any device is used
    # After submitit and JAX, which both set handlers of their own.
    stop.install(patient=True, also=(signal.SIGUSR2,))
    try:
      with processes.together():
        return self._train()
    except stop.Stopped as stopped:
      print(f"stopped by {signal.Signals(stopped.args[0]).name} after saving", file=sys.stderr)
      if processes.is_first():
        print(requeue(self.requeues), file=sys.stderr)
      sys.stderr.flush()
      sys.exit(stop.exit_code(stopped))
    except (errors.UserError, OSError) as error:
      told = errors.unwritable(error, self.workdir) if isinstance(error, OSError) else str(error)
      if told is None:
        raise
      print(f"error: {told}", file=sys.stderr)  # its line, not its traceback
      sys.exit(2)

  def _train(self) -> str:
    from qlora_jax.parallel import processes
    from qlora_jax.studies import study
    from qlora_jax.training import progress

    told = "done"
    if self.rates is None:
      _, told = study.single(self.config, self.workdir)
    else:
      trials = len(study.search_trials(self.config, self.rates))
      with progress.Display(
        total_trials=trials + len(self.config.protocol.final_seeds),
        unit=study.unit(self.config),
        stream=processes.terminal(),
      ) as display:
        resources = study.make_resources(display, self.workdir, study.is_language(self.config))
        study.train_arm(resources, (self.config, self.rates))
    if processes.is_first():
      gather(self.workdir, self.report)
    return told


def gather(workdir: pathlib.Path, report: Callable[[pathlib.Path], Any] | None) -> None:
  """Writes a sweep's tables from what is done; the report too if no setting is left to train."""
  from qlora_jax.studies import workdir as workdir_lib

  with files.lock(workdir / records.LIST):
    found = workdir_lib.gather(workdir)
    states = [records.read(workdir, each) for each in records.read_list(workdir)]
    left = any(state is None or state.state in ("running", "stopped") for state in states)
    if found and report is not None and not left:
      report(workdir)


def requeue(limit: int) -> str:
  """Requeues this job unless Slurm is ending it already, or it was requeued often enough.

  A cancelled job, one past its time limit and one that Slurm requeues itself are COMPLETING by the
  time that their processes get the signal; in its grace time before preemption a job is RUNNING.

  Returns:
    A line about it.
  """
  job = records.job_id()
  if job is None:
    return "not in a Slurm job: not requeued"
  command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
  asked = subprocess.run(command, capture_output=True, text=True, check=False)
  if asked.stdout.strip() != "RUNNING":
    return f"Slurm ends job {job} itself: not requeued"
  count = int(os.environ.get("SLURM_RESTART_COUNT", 0))
  if count >= limit:
    return f"requeued {count} times already (cluster.slurm.requeues): not requeued"
  done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
  if done.returncode:
    return f"scontrol requeue {job}: {(done.stderr or done.stdout).strip()}"
  return f"job {job} requeued: it goes on from its checkpoint"
