"""Trains on Cloud TPUs: prints or executes the commands of `tpu_commands.py`."""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import ml_collections

from qlora_jax import errors
from qlora_jax.launching import options, tpu_commands

_FAILED = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")


def arguments_of_workers(arguments: list[str]) -> list[str]:
  """The flags of `launch.py` for the workers: all except those that select where to run."""
  joined: list[str] = []
  for argument in arguments:  # `--flag value` becomes `--flag=value`
    if joined and not argument.startswith("-") and "=" not in joined[-1]:
      joined[-1] += f"={argument}"
    else:
      joined.append(argument)
  names = ("cluster", "workdir", "dry_run", "max_parallel", "config.cluster")
  dropped = re.compile(rf"--?(no)?({'|'.join(map(re.escape, names))})([.=].*)?")
  return [argument for argument in joined if not dropped.fullmatch(argument)]


def launch(
  arguments: list[str], workdir: str | None, tpu: ml_collections.ConfigDict, dry_run: bool
) -> None:
  """Prints or executes the commands that run `launch.py` on TPUs.

  Args:
    arguments: flags of the workers' `launch.py`, see `arguments_of_workers`.
    workdir: of the results; a path in the bucket if there is one.
    tpu: the config's `cluster.tpu`.
    dry_run: print only.

  Raises:
    errors.UserError: an option is invalid, a program is missing, or a command failed.
  """
  check(tpu)
  if not workdir:
    raise errors.UserError("--workdir: missing; give a directory for results and checkpoints")
  with tempfile.TemporaryDirectory() as folder:
    archive = "/tmp/qlora_jax.tar.gz" if dry_run else f"{folder}/qlora_jax.tar.gz"
    steps = tpu_commands.plan(arguments, workdir, tpu, archive)
    if dry_run:
      print("\n\n".join(step.shown() for step in steps))
      return
    program = "xpk" if tpu.way == "xpk" else "gcloud"
    if shutil.which(program) is None:
      package = "the Google Cloud CLI" if program == "gcloud" else "it with `pip install xpk`"
      raise errors.UserError(
        f"--cluster=tpu: {program} is not on the path; install {package}, or print the commands"
        " with --dry_run"
      )
    for step in steps:
      _execute(step)


def check(tpu: ml_collections.ConfigDict) -> None:
  """Raises a UserError that names the first invalid option."""
  if tpu.way not in options.TPU_WAYS:
    raise errors.UserError(
      f"cluster.tpu.way: {tpu.way!r} is unknown; use one of {', '.join(options.TPU_WAYS)}"
    )
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", tpu.name):
    raise errors.UserError(
      f"cluster.tpu.name: {tpu.name!r} is not a name; use up to 40 characters of a-z, 0-9 and -"
    )
  if tpu.slices < 1:
    raise errors.UserError(f"cluster.tpu.slices: {tpu.slices} is not a number of at least 1")
  if tpu.way == "xpk":
    if not tpu.cluster:
      raise errors.UserError("cluster.tpu.cluster: missing; give the name of the GKE cluster")
    return
  workers = tpu_commands.hosts(tpu.accelerator) * tpu.slices
  if tpu.slices > 1 and tpu.way == "vm":
    raise errors.UserError(
      f"cluster.tpu.slices: only queued resources start {tpu.slices} slices together;"
      " use cluster.tpu.way=queued"
    )
  if workers > 1 and not tpu.bucket:
    raise errors.UserError(
      f"cluster.tpu.bucket: missing; {workers} workers save into one directory; give the name of"
      " a Cloud Storage bucket"
    )


def _execute(step: tpu_commands.Step) -> None:
  print(step.shown(), file=sys.stderr, flush=True)
  if step.unless and not subprocess.run(step.unless, capture_output=True, check=False).returncode:
    print("it already exists", file=sys.stderr, flush=True)
    return
  if step.until:
    _wait(step)
    return
  running = [subprocess.Popen(command) for command in step.commands]
  try:
    codes = [process.wait() for process in running]
  except KeyboardInterrupt:
    for process in running:
      process.terminate()
    raise
  for command, code in zip(step.commands, codes, strict=True):
    if code:
      raise errors.UserError(
        f"--cluster=tpu: {shlex.join(command)[:200]} ended with {code}; correct the error that it"
        " reports and run the same command again"
      )


def _wait(step: tpu_commands.Step) -> None:
  command, last_state = step.commands[0], ""
  while True:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    state = done.stdout.strip()
    if done.returncode or state in _FAILED:
      raise errors.UserError(
        f"--cluster=tpu: the request is {state or 'unknown'}: {done.stderr.strip()[-200:]};"
        " delete it, then try another zone or try later"
      )
    if state == step.until:
      return
    if state != last_state:
      print(f"{state}, waiting for {step.until}", file=sys.stderr, flush=True)
    last_state = state
    time.sleep(tpu_commands.POLL_SECONDS)
