"""Slurm on one node, started for a test."""

import fcntl
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "slurm.sh"


def script(*arguments):
  done = subprocess.run(
    ["sh", str(SCRIPT), *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
    env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHON": sys.executable},
  )
  if done.returncode == 3:
    pytest.skip(f"no Slurm on this machine: {done.stderr.strip()}")
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope="session")
def slurm_packages():
  # Several test workers may run at once; the lock lets one install.
  with open("/tmp/qlora_jax_slurm.lock", "w") as handle:
    fcntl.flock(handle, fcntl.LOCK_EX)
    script("install")


@pytest.fixture
def slurm(slurm_packages, tmp_path_factory, monkeypatch):
  """Starts the node; all Slurm commands of this process and its children use it."""
  folder = tmp_path_factory.mktemp("slurm")
  script("start", folder)
  monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
  yield folder
  script("stop", folder)
