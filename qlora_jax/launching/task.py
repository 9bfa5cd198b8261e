"""The body of a Slurm job: one arm of a study, or one trial; it saves and requeues on a signal.

Slurm sends SIGUSR2 `cluster.slurm.signal_seconds` before the time limit, and SIGTERM when it
preempts or cancels. The loop saves at its next chunk and raises `stop.Stopped`. If Slurm is not
already ending the job, the job requeues itself under the same id and continues from its checkpoint.
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
    workdir: prepared by `studies.workdir.prepare`; all nodes see it.
    config: of the arm, or of the single trial.
    rates: learning rates of the arm; None for a single trial.
    requeues: maximum number of requeues.
    report: called with `workdir` when all arms of the study have ended.
  """

  workdir: pathlib.Path
  config: Any
  rates: list[float] | None
  requeues: int
  report: Callable[[pathlib.Path], Any] | None = None

  def __call__(self) -> str:
    """Trains and returns a message.

    It exits with 143 (SIGTERM) or 140 (SIGUSR2) after a signal, when it has saved, and with 2 after
    a user's error.
    """
    from qlora_jax.parallel import processes

    processes.start()  # before the first use of a device
    # After submitit and JAX, because both set signal handlers.
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
      message = errors.unwritable(error, self.workdir) if isinstance(error, OSError) else str(error)
      if message is None:
        raise
      print(f"error: {message}", file=sys.stderr)  # one line, no traceback
      sys.exit(2)

  def _train(self) -> str:
    from qlora_jax.parallel import processes
    from qlora_jax.studies import study
    from qlora_jax.training import progress

    message = "done"
    if self.rates is None:
      _, message = study.single(self.config, self.workdir)
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
    return message


def gather(workdir: pathlib.Path, report: Callable[[pathlib.Path], Any] | None) -> None:
  """Writes a study's tables from the finished arms; after the last arm also the report."""
  from qlora_jax.studies import workdir as workdir_lib

  with files.lock(workdir / records.LIST):
    has_final_results = workdir_lib.gather(workdir)
    arm_records = [records.read(workdir, arm) for arm in records.read_list(workdir)]
    unfinished = any(
      record is None or record.state in ("running", "stopped") for record in arm_records
    )
    if has_final_results and report is not None and not unfinished:
      report(workdir)


def requeue(limit: int) -> str:
  """Requeues this job, unless Slurm is already ending it or it has been requeued `limit` times.

  When the processes get the signal, a job is COMPLETING if it was cancelled, has exceeded its time
  limit, or is being requeued by Slurm. In its grace time before preemption it is RUNNING.

  Returns:
    A message about the result.
  """
  job = records.job_id()
  if job is None:
    return "not in a Slurm job: not requeued"
  command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
  queue = subprocess.run(command, capture_output=True, text=True, check=False)
  if queue.stdout.strip() != "RUNNING":
    return f"Slurm is already ending job {job}: not requeued"
  count = int(os.environ.get("SLURM_RESTART_COUNT", 0))
  if count >= limit:
    return f"requeued {count} times already (cluster.slurm.requeues): not requeued"
  done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
  if done.returncode:
    return f"scontrol requeue {job}: {(done.stderr or done.stdout).strip()}"
  return f"job {job} requeued: it continues from its checkpoint"
