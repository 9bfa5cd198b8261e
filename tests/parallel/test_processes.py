"""Several processes over loopback: they train as one process does, and end together."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import process_case
import pytest
from safetensors import numpy as safetensors_numpy

from qlora_jax import errors
from qlora_jax.parallel import processes

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = "--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0"


def start(arguments, count, devices):
  """Starts `count` processes of `devices` devices each."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  return [
    subprocess.Popen(
      [sys.executable, *arguments],
      cwd=ROOT,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env=os.environ
      | {
        "PYTHONPATH": ".",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FLAGS.format(devices),
        **(
          {
            "QLORA_JAX_COORDINATOR": f"127.0.0.1:{port}",
            "QLORA_JAX_PROCESSES": str(count),
            "QLORA_JAX_PROCESS": str(index),
          }
          if count > 1
          else {}
        ),
      },
    )
    for index in range(count)
  ]


def finish(started):
  for process in started:
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr


def losses(directory):
  lines = next(directory.rglob("metrics.jsonl")).read_text().splitlines()
  return [json.loads(line)["train/loss"] for line in lines]


def adapter(directory):
  return safetensors_numpy.load_file(directory / "adapter/adapter.safetensors")


def result(directory):
  results = (json.loads(path.read_text()) for path in directory.rglob("result.json"))
  return next(stored["training"] for stored in results)


def written(data, *more):
  """Writes training rows, three test rows, and `more` splits with some of the training rows."""
  data.mkdir()
  rows = [{"prompt": f"say {word}", "completion": "so " * (word % 5 + 1)} for word in range(40)]
  for split, part in (("train", rows), ("test", rows[:3]), *((name, rows[20:26]) for name in more)):
    (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


@pytest.fixture(scope="module")
def runs(tiny_llama, tmp_path_factory):
  """A training on four devices, fsdp 2 x tensor 2, by one, two (`launch.py`) and four processes."""
  folder = tmp_path_factory.mktemp("processes")
  data, weights = folder / "data", str(tiny_llama)
  written(data)
  for count in (1, 4):
    finish(
      start(
        ["tests/parallel/process_case.py", weights, str(data), str(folder / str(count))],
        count,
        4 // count,
      )
    )
  flags = [f"--config.{path}={value}" for path, value in process_case.fields(weights, data).items()]
  finish(start(["launch.py", "--config=configs/llm.py", f"--workdir={folder}/2", *flags], 2, 2))
  return folder


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_as_one_does(count, runs):
  # The rows of a step are the same; sums over them run in another order (float32).
  np.testing.assert_allclose(losses(runs / str(count)), losses(runs / "1"), rtol=1e-5)
  one, several = adapter(runs / "1"), adapter(runs / str(count))
  assert one.keys() == several.keys()
  for name in one:
    # Three steps of Adam at 1e-2 move a weight by up to 3e-2. Adam divides by gradients that can be
    # near 0: the error is at most 1/300 of that, and its median 1e-5 of it.
    error = np.abs(several[name] - one[name])
    assert error.max() < 1e-4 and np.median(error) < 3e-7, name
  expected, actual = result(runs / "1")["after"], result(runs / str(count))["after"]
  assert {name: actual[name] for name in expected} == pytest.approx(expected, rel=1e-3)
  assert ("test/accuracy" in actual) == (count == 2)  # `launch.py` generates as well


def test_two_processes_sweep_together_and_leave_one_study(tiny_llama, tmp_path):
  written(tmp_path / "data", "validation")
  fields = process_case.fields(str(tiny_llama), str(tmp_path / "data"))
  fields |= {"mesh.tensor": 1, "protocol.final_seeds": "(100,)"}
  flags = [
    f"--config.{path}={value}"
    for path, value in fields.items()
    if path not in ("adapter.name", "optimizer.learning_rate")
  ]
  command = ["launch.py", "--config=configs/llm.py:gsm8k", "--sweep", *flags]
  finish(start([*command, f"--workdir={tmp_path}/sweep"], 2, 1))
  assert (tmp_path / "sweep" / "report" / "report.html").is_file()
  rows = pd.read_parquet(tmp_path / "sweep" / "results.parquet")
  assert len(rows) == 2 * (3 + 1) and rows["validation_nats"].notna().all()
  for _, arm_rows in rows.groupby("arm"):
    search = arm_rows[arm_rows["stage"] == "search"]
    final = arm_rows[arm_rows["stage"] == "final"]
    best = search.loc[search["validation_nats"].idxmin(), "learning_rate"]
    assert final["learning_rate"].tolist() == [best] and final["test_nats"].notna().all()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_with_one_line(lost):
  started = start(["tests/parallel/lost_case.py"], 2, 1)
  while started[0].stdout.readline().strip() != "5":
    assert started[0].poll() is None, started[0].stderr.read()
  started[lost].send_signal(signal.SIGKILL)
  killed = time.monotonic()
  other = started[1 - lost]
  stderr = other.communicate(timeout=120)[1].splitlines()
  assert time.monotonic() - killed < 60
  assert other.returncode in (processes.EXIT_LOST, -signal.SIGABRT)
  started[lost].communicate()
  error_lines = [line for line in stderr if line.startswith("error: ")]
  assert len(error_lines) == 1 and f"process {1 - lost} of 2" in error_lines[0]
  assert "same command again" in error_lines[0]
  assert "Traceback" not in "".join(stderr)


@pytest.mark.parametrize(
  ("environment", "message"),
  [
    ({"QLORA_JAX_PROCESSES": "2"}, "QLORA_JAX_COORDINATOR: missing"),
    (("nowhere", "2", "0"), "give HOST:PORT"),
    (("host:1", "two", "0"), "QLORA_JAX_PROCESSES: 'two'"),
    (("host:1", "2", "2"), "a number from 0 to 1"),
  ],
)
def test_an_error_in_the_environment_is_one_line(environment, message):
  names = ("QLORA_JAX_COORDINATOR", "QLORA_JAX_PROCESSES", "QLORA_JAX_PROCESS")
  if not isinstance(environment, dict):
    environment = dict(zip(names, environment, strict=True))
  with pytest.raises(errors.UserError, match=message):
    processes.values(environment)


def test_a_process_alone_starts_nothing():
  assert processes.values({}) is None
  assert not processes.detected({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
  assert processes.detected({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"})
  assert processes.detected({"TPU_WORKER_HOSTNAMES": "a,b"})
  assert processes.is_first()
