"""Compiles a step for a TPU topology without having any TPU, in a separate process.

With `_ENVIRONMENT` libtpu does not search for a TPU. libtpu is imported as an installed package, or
from the folder `libtpu` of the environment, where `make setup-tpu` installs it. Other processes do
not import it from there; otherwise every start of JAX would search for a TPU and print warnings.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from typing import Any

from qlora_jax import errors
from qlora_jax.planning import hardware, program

_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}
_ROOT = pathlib.Path(__file__).parents[2]
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class CompilerError(RuntimeError):
  """The TPU compiler failed for a reason other than memory; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Request:
  """A worker's task.

  Attributes:
    job: the step.
    topology: the chips.
    result: file for the result, as JSON.
    hlo: file for the text of the compiled program; '' writes none.
  """

  job: program.Job
  topology: hardware.Topology
  result: str
  hlo: str = ""


def folder() -> pathlib.Path:
  """The folder into which `make setup-tpu` installs libtpu."""
  return pathlib.Path(sys.prefix) / "libtpu"


def check() -> None:
  """Raises a UserError if libtpu is not installed."""
  if importlib.util.find_spec("libtpu") is None and not (folder() / "libtpu").is_dir():
    raise errors.UserError(
      "--plan: libtpu, the TPU compiler, is not installed; run `make setup-tpu` (213 MB) or"
      " pip install -r requirements-tpu.txt"
    )


def run(job: program.Job, topology: hardware.Topology, hlo: str = "") -> dict[str, Any]:
  """Compiles a step and returns the result of `worker.measure`.

  Raises:
    UserError: libtpu is not installed.
    CompilerError: the compiler failed for a reason other than memory; has its last line of output.
  """
  check()
  with tempfile.TemporaryDirectory() as scratch:
    result = pathlib.Path(scratch) / "result.json"
    request = Request(job, topology, str(result), hlo)
    environment = {**os.environ, **_ENVIRONMENT}
    path = [str(_ROOT), str(folder()), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in path if entry)
    worker = subprocess.Popen(
      [sys.executable, "-m", "qlora_jax.planning.worker"],
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
    )
    try:
      _, stderr = worker.communicate(pickle.dumps(request))
    finally:
      worker.kill()  # if this process was interrupted
      worker.wait()
    if not result.exists():
      raise CompilerError(f"the TPU compiler {_ending(worker.returncode, stderr)}")
    return json.loads(result.read_text())


def _ending(code: int, stderr: bytes) -> str:
  """How a process ended, with its last line on standard error.

  Lines of libtpu's traces are skipped, because they are addresses without names.
  """
  lines = [
    line.strip()
    for line in stderr.decode(errors="replace").splitlines()
    if line.strip() and "symbolize" not in line
  ]
  if code < 0:
    return f"crashed ({signal.Signals(-code).name})"
  stopped = f"stopped with code {code}"
  return f"{stopped}: {lines[-1]}" if lines else stopped


def exceeded(message: str) -> dict[str, int] | None:
  """HBM in bytes that a program uses and its limit, from the compiler's error; None if absent."""
  matched = _USED.search(message)
  if matched is None:
    return None
  used, used_unit, limit, limit_unit = matched.groups()
  return {
    "used": int(float(used) * 1024 ** _UNITS[used_unit.upper()]),
    "limit": int(float(limit) * 1024 ** _UNITS[limit_unit.upper()]),
  }
