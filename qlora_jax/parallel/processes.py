"""Starting a run's processes, one a host, and ending all of them when one is lost.

Under Slurm, on a TPU pod and on GKE every process finds the others by itself. Anywhere else three
environment variables say who is who (or the arguments of `start`):

  QLORA_JAX_COORDINATOR=HOST:PORT   where process 0 listens
  QLORA_JAX_PROCESSES=N             how many processes there are
  QLORA_JAX_PROCESS=0..N-1          which one this is

Every process of a group runs the same program. A process that stops answering ends the others
within `LOST_AFTER` seconds, each with one line and the exit code `EXIT_LOST`.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping

import jax

from qlora_jax import errors

LOST_AFTER = 20.0  # seconds without a sign of life
EXIT_LOST = 69  # EX_UNAVAILABLE: start the same command again, it continues
_BEAT = 2.0  # seconds between signs of life
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
  given = _given(os.environ, coordinator, count, index)
  if given is None and not _detected(os.environ):
    return
  options = {}
  if given is not None:
    options = dict(zip(("coordinator_address", "num_processes", "process_id"), given, strict=True))
    options["cluster_detection_method"] = "deactivate"
  jax.distributed.initialize(**options, heartbeat_timeout_seconds=int(LOST_AFTER))


def _given(
  environment: Mapping[str, str], coordinator: str | None, count: int | None, index: int | None
) -> tuple[str, int, int] | None:
  """The three values that name a process, or None where there are none."""
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


def _detected(environment: Mapping[str, str]) -> bool:
  """Whether a launcher started this process as one of several."""
  if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
    return True
  return len(environment.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1


def is_first() -> bool:
  """Whether this process writes the run's files and shows its progress."""
  return jax.process_index() == 0
