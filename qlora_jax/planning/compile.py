"""Compiling a step for a TPU topology that is not there, in a process of its own.

libtpu compiles without a TPU when told not to look for one; `_ENVIRONMENT` does that. It is found
where it is installed, or in the folder `libtpu` of the environment, where `make setup-tpu` puts it:
there it is out of the way of ordinary runs, which it would make write warnings.
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
  """The TPU compiler stopped for another reason than memory; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Request:
  """What a worker compiles: `result` is where it writes JSON, `hlo` where the text, if anywhere."""

  job: program.Job
  topology: hardware.Topology
  result: str
  hlo: str = ""


def folder() -> pathlib.Path:
  """Where `make setup-tpu` puts libtpu."""
  return pathlib.Path(sys.prefix) / "libtpu"


def check() -> None:
  """Raises a UserError where libtpu is not installed."""
  if importlib.util.find_spec("libtpu") is None and not (folder() / "libtpu").is_dir():
    raise errors.UserError(
      "--plan: libtpu, the TPU compiler, is not installed; run `make setup-tpu` (213 MB) or"
      " pip install -r requirements-tpu.txt"
    )


def run(job: program.Job, topology: hardware.Topology, hlo: str = "") -> dict[str, Any]:
  """Compiles; see `worker.measure` for the result.

  Raises:
    UserError: libtpu is not installed.
    CompilerError: the compiler failed for another reason than memory; with its last words.
  """
  check()
  with tempfile.TemporaryDirectory() as scratch:
    result = pathlib.Path(scratch) / "result.json"
    request = Request(job, topology, str(result), hlo)
    environment = {**os.environ, **_ENVIRONMENT}
    path = [str(_ROOT), str(folder()), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(each for each in path if each)
    worker = subprocess.Popen(
      [sys.executable, "-m", "qlora_jax.planning.worker"],
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
    )
    try:
      _, said = worker.communicate(pickle.dumps(request))
    finally:
      worker.kill()  # where this process was interrupted
      worker.wait()
    if not result.exists():
      raise CompilerError(f"the TPU compiler {_ended(worker.returncode, said)}")
    return json.loads(result.read_text())


def _ended(code: int, said: bytes) -> str:
  """How a process ended, with its last words; libtpu's traces are addresses without names."""
  lines = [
    line.strip()
    for line in said.decode(errors="replace").splitlines()
    if line.strip() and "symbolize" not in line
  ]
  how = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"stopped with code {code}"
  return f"{how}: {lines[-1]}" if lines and code >= 0 else how


def exceeded(message: str) -> dict[str, int] | None:
  """Bytes that a program which does not fit needs and has, from the compiler's words."""
  found = _USED.search(message)
  if found is None:
    return None
  used, used_unit, limit, limit_unit = found.groups()
  return {
    "used": int(float(used) * 1024 ** _UNITS[used_unit.upper()]),
    "limit": int(float(limit) * 1024 ** _UNITS[limit_unit.upper()]),
  }
