"""Starts the processes of a training, one per host, and ends all of them if one is lost.

Under Slurm, on a TPU pod and on GKE every process finds the others automatically (on TPU-VMs only
if QLORA_JAX_DISTRIBUTED=1). Elsewhere three environment variables, or the arguments of `start`,
identify the process:

  QLORA_JAX_COORDINATOR=HOST:PORT   address on which process 0 listens
  QLORA_JAX_PROCESSES=N             number of processes
  QLORA_JAX_PROCESS=0..N-1          index of this process

All processes run the same program. If one is lost, each of the others prints one line and ends, at
most `LOST_AFTER` seconds later. The exit code is `EXIT_LOST` if Python receives the error, and 134
if JAX's runtime ends the process, which happens when process 0 is lost.
"""

import atexit
import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from qlora_jax import errors

LOST_AFTER = 30  # seconds without a heartbeat
EXIT_LOST = 69  # EX_UNAVAILABLE: the same command continues
# Messages of the runtimes, in a ValueError or a JaxRuntimeError, when a connection breaks.
_LOST = re.compile(
  r"(UNKNOWN|UNAVAILABLE|ABORTED|INTERNAL|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): .*"
  r"(gloo|nccl|connection|socket|heartbeat|barrier|unhealthy)",
  re.IGNORECASE | re.DOTALL,
)
# A child process that prints the error line if this process dies without writing to the pipe: JAX's
# runtime ends a process without running any Python code.
_WITNESS = """
import os, sys
if not os.read(0, 1):
  os.write(2, sys.argv[1].encode())
"""
_VARIABLES = ("QLORA_JAX_COORDINATOR", "QLORA_JAX_PROCESSES", "QLORA_JAX_PROCESS")


def start(
  coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
  """Joins the other processes of the training, if there are any; a second call has no effect.

  Call it before the first use of a device.

  Args:
    coordinator, count, index: as the environment variables, and with priority over them.

  Raises:
    UserError: only some of the three are set, or a value is invalid.
  """
  if jax.distributed.is_initialized():
    return
  identity = values(os.environ, coordinator, count, index)
  if identity is None and not detected(os.environ):
    return
  options = {}
  if identity is not None:
    names = ("coordinator_address", "num_processes", "process_id")
    options = dict(zip(names, identity, strict=True))
    options["cluster_detection_method"] = "deactivate"
  # JAX's handler of SIGTERM would replace ours, which saves and stops.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    **options, heartbeat_timeout_seconds=LOST_AFTER, shutdown_timeout_seconds=LOST_AFTER
  )
  _watch()


def _watch() -> None:
  """Starts the witness, which prints the error line if this process dies without `_dismiss`."""
  global _dismiss
  witness = subprocess.Popen(
    [sys.executable, "-S", "-c", _WITNESS, _message("was killed, or lost another process")],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    start_new_session=True,  # a signal to the process group must not reach the witness
  )

  def dismiss():
    with contextlib.suppress(OSError):
      os.write(witness.stdin.fileno(), b".")

  _dismiss = dismiss
  atexit.register(dismiss)


def _dismiss() -> None:
  """Ends the witness without a line; `_watch` replaces this function."""


def _message(event: str) -> str:
  process = f"process {jax.process_index()} of {jax.process_count()}"
  return (
    f"error: {process} {event}; start all with the same command again, the training continues\n"
  )


@contextlib.contextmanager
def together() -> Iterator[None]:
  """The body runs in all processes; all leave it together, or all end because one is lost."""
  try:
    yield
    if jax.distributed.is_initialized():
      multihost_utils.sync_global_devices("end")
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    if not jax.distributed.is_initialized() or not _LOST.search(str(error)):
      raise
    _dismiss()
    sys.stdout.flush()
    sys.stderr.write(_message("lost another process"))
    sys.stderr.flush()
    os._exit(EXIT_LOST)  # an orderly exit would wait for the lost process


def agreed(value: bool | int) -> int:
  """Process 0's value, for decisions that depend on files: other hosts may see files later."""
  if not jax.distributed.is_initialized():
    return int(value)
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def values(
  environment: Mapping[str, str],
  coordinator: str | None = None,
  count: int | None = None,
  index: int | None = None,
) -> tuple[str, int, int] | None:
  """The (address, count, index) of the arguments or environment; None if none of them is set.

  Raises:
    UserError: only some of the three are set, or a value is invalid.
  """
  arguments = (coordinator, count, index)
  fields = [
    environment.get(name) if value is None else str(value)
    for name, value in zip(_VARIABLES, arguments, strict=True)
  ]
  missing = [name for name, value in zip(_VARIABLES, fields, strict=True) if not value]
  if len(missing) == len(_VARIABLES):
    return None
  if missing:
    raise errors.UserError(f"{missing[0]}: missing; set all of {', '.join(_VARIABLES)} or none")
  address, total, position = fields
  if not re.fullmatch(r"\S+:\d+", address):
    raise errors.UserError(f"{_VARIABLES[0]}: {address!r} is not an address; give HOST:PORT")
  if not total.isdigit() or int(total) < 1:
    raise errors.UserError(f"{_VARIABLES[1]}: {total!r} is not a number of at least 1")
  if not position.isdigit() or int(position) >= int(total):
    raise errors.UserError(
      f"{_VARIABLES[2]}: {position!r} is not a number from 0 to {int(total) - 1}"
    )
  return address, int(total), int(position)


def detected(environment: Mapping[str, str]) -> bool:
  """Whether a launcher started this process as one of several."""
  if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
    return True
  if environment.get("QLORA_JAX_DISTRIBUTED") == "1":
    return True
  return len(environment.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1


def is_first() -> bool:
  """Whether this process writes the files of the training and shows its progress."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
  """Process 0 runs the body first; the others run it afterwards and see its files."""
  several = jax.distributed.is_initialized()
  if several and not is_first():
    multihost_utils.sync_global_devices("turn")
  try:
    yield
  finally:  # also after an error, so that the others do not wait for ever
    if several and is_first():
      multihost_utils.sync_global_devices("turn")


def terminal() -> TextIO:
  """The stream for progress: standard error for process 0, the null device for the others."""
  if is_first():
    return sys.stderr
  return open(os.devnull, "w", encoding="utf-8")


def own_directory(directory: pathlib.Path) -> pathlib.Path:
  """`directory` for process 0; for the others a temporary directory, removed at exit."""
  if is_first():
    return directory
  scratch = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, scratch, ignore_errors=True)
  return pathlib.Path(scratch)
