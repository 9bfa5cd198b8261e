"""Starting a run's processes, one a host, and ending all of them when one is lost.

Under Slurm, on a TPU pod and on GKE every process finds the others by itself (on TPU-VMs it looks
for them if QLORA_JAX_DISTRIBUTED=1). Anywhere else three environment variables say who is who (or
the arguments of `start`):

  QLORA_JAX_COORDINATOR=HOST:PORT   where process 0 listens
  QLORA_JAX_PROCESSES=N             how many processes there are
  QLORA_JAX_PROCESS=0..N-1          which one this is

Every process of a group runs the same program. When one is lost, each of the others says so in one
line and ends, at the latest `LOST_AFTER` seconds later: with `EXIT_LOST` where Python learns of it,
with 134 where JAX's own runtime ends the process (process 0, which the others ask, was lost).
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

LOST_AFTER = 30  # seconds without a sign of life
EXIT_LOST = 69  # EX_UNAVAILABLE: start the same command again, it continues
# What the runtimes say, as a ValueError or a JaxRuntimeError, when a connection breaks.
_LOST = re.compile(
  r"(UNKNOWN|UNAVAILABLE|ABORTED|INTERNAL|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): .*"
  r"(gloo|nccl|connection|socket|heartbeat|barrier|unhealthy)",
  re.IGNORECASE | re.DOTALL,
)
# Outlives this process by one line, because JAX's runtime ends it without a word of Python's.
_WITNESS = """
import os, sys
if not os.read(0, 1):
  os.write(2, sys.argv[1].encode())
"""
_VARIABLES = ("QLORA_JAX_COORDINATOR", "QLORA_JAX_PROCESSES", "QLORA_JAX_PROCESS")


def start(
  coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
  """Joins the run's other processes, if there are any; calling it again changes nothing.

  It must come before the first use of a device.

  Args:
    coordinator, count, index: as the environment variables; they go before them.

  Raises:
    UserError: some of the three are given but not all, or they make no sense.
  """
  if jax.distributed.is_initialized():
    return
  given = values(os.environ, coordinator, count, index)
  if given is None and not detected(os.environ):
    return
  options = {}
  if given is not None:
    options = dict(zip(("coordinator_address", "num_processes", "process_id"), given, strict=True))
    options["cluster_detection_method"] = "deactivate"
  # JAX's own handler of SIGTERM would take the place of the one that saves and stops.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    **options, heartbeat_timeout_seconds=LOST_AFTER, shutdown_timeout_seconds=LOST_AFTER
  )
  _watch()


def _watch() -> None:
  """Starts the witness, which speaks if this process ends without saying so."""
  global _goodbye
  witness = subprocess.Popen(
    [sys.executable, "-S", "-c", _WITNESS, _message("was killed, or lost another process")],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    start_new_session=True,  # a signal to the whole group is not for it
  )

  def goodbye():
    with contextlib.suppress(OSError):
      os.write(witness.stdin.fileno(), b".")

  _goodbye = goodbye
  atexit.register(goodbye)


def _goodbye() -> None:
  """Replaced by `_watch`."""


def _message(what: str) -> str:
  me = f"process {jax.process_index()} of {jax.process_count()}"
  return f"error: {me} {what}; start all with the same command again, the run continues\n"


@contextlib.contextmanager
def together() -> Iterator[None]:
  """What all processes do together: it ends when all have ended it, or when one is lost."""
  try:
    yield
    if jax.distributed.is_initialized():
      multihost_utils.sync_global_devices("end")
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    if not jax.distributed.is_initialized() or not _LOST.search(str(error)):
      raise
    _goodbye()
    sys.stdout.flush()
    sys.stderr.write(_message("lost another process"))
    sys.stderr.flush()
    os._exit(EXIT_LOST)  # an orderly end would wait for the lost one


def agreed(value: bool | int) -> int:
  """Process 0's value, for what files say: other hosts may see them later."""
  if not jax.distributed.is_initialized():
    return int(value)
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def values(
  environment: Mapping[str, str],
  coordinator: str | None = None,
  count: int | None = None,
  index: int | None = None,
) -> tuple[str, int, int] | None:
  """The address, count and index that `start` was given, or None where there are none."""
  own = (coordinator, count, index)
  found = [
    environment.get(name) if value is None else str(value)
    for name, value in zip(_VARIABLES, own, strict=True)
  ]
  missing = [name for name, value in zip(_VARIABLES, found, strict=True) if not value]
  if len(missing) == len(_VARIABLES):
    return None
  if missing:
    raise errors.UserError(f"{missing[0]}: missing; set all of {', '.join(_VARIABLES)} or none")
  address, total, place = found
  if not re.fullmatch(r"\S+:\d+", address):
    raise errors.UserError(f"{_VARIABLES[0]}: {address!r} is not an address; give HOST:PORT")
  if not total.isdigit() or int(total) < 1:
    raise errors.UserError(f"{_VARIABLES[1]}: {total!r} is not a number of at least 1")
  if not place.isdigit() or int(place) >= int(total):
    raise errors.UserError(f"{_VARIABLES[2]}: {place!r} is not a number from 0 to {int(total) - 1}")
  return address, int(total), int(place)


def detected(environment: Mapping[str, str]) -> bool:
  """Whether a launcher started this process as one of several."""
  if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
    return True
  if environment.get("QLORA_JAX_DISTRIBUTED") == "1":
    return True
  return len(environment.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1


def is_first() -> bool:
  """Whether this process writes the run's files and shows its progress."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
  """Process 0 does what is inside before the others, which then find its files."""
  several = jax.distributed.is_initialized()
  if several and not is_first():
    multihost_utils.sync_global_devices("turn")
  try:
    yield
  finally:  # also after a mistake, which the others then find too
    if several and is_first():
      multihost_utils.sync_global_devices("turn")


def terminal() -> TextIO:
  """Where this process shows its progress: standard error for the first, nowhere for the others."""
  if is_first():
    return sys.stderr
  return open(os.devnull, "w", encoding="utf-8")


def own_directory(directory: pathlib.Path) -> pathlib.Path:
  """`directory` for process 0, a place that is thrown away for the others."""
  if is_first():
    return directory
  scratch = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, scratch, ignore_errors=True)
  return pathlib.Path(scratch)
