"""A run killed at any moment comes to the bits of the run that nothing stopped."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from qlora_jax.training import metrics

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def killed(tiny_llama, tmp_path_factory):
  """The folder of all runs, what happened to each start, and what was printed."""
  folder = tmp_path_factory.mktemp("killed")
  (folder / "data.jsonl").write_text(
    "".join(
      json.dumps({"prompt": f"say {word}", "completion": str(word)}) + "\n" for word in range(40)
    )
  )
  done = subprocess.run(
    [sys.executable, "tests/training/killed.py", folder, tiny_llama, folder / "data.jsonl"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
  )
  assert done.returncode == 0, done.stderr
  return folder, json.loads((folder / "told.json").read_text()), done


def recorded(folder):
  """What a run wrote of its steps, but for the time they took."""
  return [
    {name: value for name, value in line.items() if name != "train/tokens_per_second"}
    for line in metrics.read_metrics(folder)
  ]


def test_the_best_step_is_the_one_with_the_least_validation_loss(killed):
  folder, _, _ = killed
  nats = {
    line["step"]: line["validation/nats"]
    for line in recorded(folder / "whole")
    if "validation/nats" in line
  }
  assert list(nats) == [4, 8, 12, 16, 20]
  best = json.loads((folder / "whole/result.json").read_text())["training"]["best"]
  assert best["validation/nats"] == nats[best["step"]] == min(nats.values())
  last, kept = (
    safetensors_numpy.load_file(folder / "whole" / name / "adapter.safetensors")
    for name in ("adapter", "adapter_best")
  )
  same = all(np.array_equal(last[name], kept[name]) for name in last)
  assert same == (best["step"] == 20)
  told = json.loads((folder / "whole/adapter_best/adapter.json").read_text())
  assert told["metadata"]["training"]["steps"] == best["step"]


def test_twenty_kills_landed_where_they_were_meant_to(killed):
  _, told, done = killed
  told = told["kills"]
  codes = [each["code"] for each in told if each["moment"] != "end"]
  assert codes.count(-9) == 20 and codes.count(143) == 1, done.stdout
  assert codes.count(2) == 1 and len(codes) == 22
  assert all(each["code"] == 0 for each in told if each["moment"] == "end"), done.stderr
  # Kills inside a save left it unfinished, and the next start says so.
  unfinished = [each for each in told if any("tmp" in name for name in each["left"])]
  assert len(unfinished) >= 3
  assert done.stderr.count("was not finished; it is removed") == len(unfinished)
  assert "damaged" not in done.stderr


@pytest.mark.parametrize("chain", ["compile", "start", "save", "step"])
def test_a_killed_run_comes_to_the_same_losses_and_adapter(chain, killed):
  folder, _, _ = killed
  lines, expected = recorded(folder / chain), recorded(folder / "whole")
  assert lines == expected and [line["step"] for line in expected] == list(range(2, 21, 2))
  # It learns: a wrong state would show.
  assert expected[-1]["train/loss"] < expected[0]["train/loss"]
  for adapter in ("adapter", "adapter_best"):
    again, once = (
      safetensors_numpy.load_file(folder / name / adapter / "adapter.safetensors")
      for name in (chain, "whole")
    )
    assert again.keys() == once.keys()
    for name in once:
      np.testing.assert_array_equal(again[name], once[name], err_msg=f"{adapter} {name}")
  results = [
    json.loads((folder / name / "result.json").read_text())["training"] for name in (chain, "whole")
  ]
  assert all(results[0][name] == results[1][name] for name in ("after", "best", "steps"))
  assert not (folder / chain / "checkpoints").exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(killed):
  _, told, done = killed
  (line,) = [each for each in done.stdout.splitlines() if each.startswith("error:")]
  assert "--workdir: the checkpoint" in line and "(File too large); make room" in line
  (full,) = [each for each in told["kills"] if each["code"] == 2]
  assert full["left"] and not any("tmp" in name for name in full["left"])
  assert "Traceback" not in done.stderr


def test_a_run_goes_on_with_other_devices_and_processes(killed):
  folder, told, done = killed
  codes, steps = ([place[name] for place in told["places"]] for name in ("codes", "steps"))
  # A signal to one process of two stops both, where they ask each other: at an even step.
  assert codes == [[143], [143], [143, 143], [0]], done.stdout + done.stderr
  assert [each[-1:] for each in steps] == [[5], [10], [16], []]
  lines, expected = (
    {line["step"]: line["train/loss"] for line in metrics.read_metrics(folder / name)}
    for name in ("elsewhere", "whole")
  )
  assert lines.keys() == expected.keys()
  for step, loss in expected.items():
    # Sums over devices are added in another order: float32 rounding that training carries on.
    np.testing.assert_allclose(lines[step], loss, rtol=1e-5, err_msg=str(step))
