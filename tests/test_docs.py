"""Every command that the documentation shows runs, shrunk to a few steps where it trains."""

import itertools
import json
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from unittest import mock

import in_process
import pytest

from experiments import study
from qlora_jax.studies import records

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
RESULTS = ROOT / "experiments" / "results"
COMMAND = re.compile(r"^ *((?:make|python|pip|pytest)\b.*)$")
FENCED = re.compile(r"```sh\n(.*?)```", re.DOTALL)
SMALL = [
  "--config.model.width=16",
  "--config.model.hidden=16",
  "--config.adapter.budget=1024",
  "--config.optimizer.steps=2",
  "--config.pretrain.steps=2",
]
# Instead of what a command for a language model gives: a tiny model, and few of everything.
TINY = {
  "model.layers_per_block": 1,
  "adapter.rank": 2,
  "adapter.atoms": 2,
  "instruction.dim": 2,
  "optimizer.steps": 2,
  "eval.examples": 1,
  "eval.validation": 2,
  "eval.max_tokens": 2,
  "eval.batch_size": 2,
  "data.length": 128,
}


def commands():
  found = {}
  for page in PAGES:
    for block in FENCED.findall(page.read_text()):
      for line in block.replace("\\\n", " ").splitlines():
        if matched := COMMAND.match(line):
          text = " ".join(re.sub(r"\s#.*", "", matched[1]).split())
          found.setdefault(text, str(page.relative_to(ROOT)))
  return [pytest.param(text, id=f"{name}: {text}") for text, name in found.items()]


def execute(arguments, tmp_path, told=None):
  # What sets up JAX or signals for machines elsewhere, or waits for words, has its own process.
  apart = ("--plan", "--cluster", "py_compile", "qlora_jax.generate")
  if arguments[0] == sys.executable and not any(each.startswith(apart) for each in arguments):
    done = in_process.run(arguments[1:], told or "")
  else:
    done = subprocess.run(
      arguments, cwd=ROOT, capture_output=True, text=True, check=False, input=told
    )
  assert done.returncode == 0, done.stdout + done.stderr
  return done


def for_tiny_model(arguments, folder, tiny_llama):
  """The arguments of a launch with a language model's config, made cheap; results in `folder`."""
  kept = [
    each
    for each in arguments
    if not each.startswith(
      ("--workdir", "--config.model.weights", *(f"--config.{name}=" for name in TINY))
    )
  ]
  mine = folder / "mine.jsonl"
  rows = ({"instruction": "Say it.", "input": str(n), "output": str(n)} for n in range(40))
  mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
  kept = [f"--config.data.name={mine}" if "mine.jsonl" in each else each for each in kept]
  small = [f"--config.{name}={value}" for name, value in TINY.items()]
  return [*kept, *small, f"--workdir={folder}/run", f"--config.model.weights={tiny_llama}"]


def trains(arguments):
  """Whether a study's command trains."""
  return any(argument.startswith("--workdir") for argument in arguments)


def on_committed_results(arguments, folder):
  """A study's command on the committed runs instead of a sweep's, with results in `folder`."""
  record = study.load(arguments[2])
  source = RESULTS / record.results
  if any(argument.startswith("--from=") for argument in arguments):
    return [*arguments[:3], f"--from={source}", f"--results={folder}"]
  shutil.copytree(source, folder, dirs_exist_ok=True)
  return [*arguments[:3], f"--results={folder}"]


@pytest.fixture(scope="session")
def tiny_adapter(tiny_llama, tmp_path_factory):
  """The adapter of the page's run on the user's own data, for what comes after it."""
  text = next(each.values[0] for each in commands() if "data.name=mine.jsonl" in each.values[0])
  folder = tmp_path_factory.mktemp("mine")
  _, *arguments = shlex.split(text)
  done = execute([sys.executable, *for_tiny_model(arguments, folder, tiny_llama)], folder)
  assert f"adapter: {folder}/run/adapter" in done.stdout
  return folder / "run/adapter"


@pytest.mark.parametrize("text", commands())
def test_a_command_of_the_documentation_runs(text, tmp_path, shared_data, request):
  program, *arguments = shlex.split(re.sub(r"\[.*", "", text))  # without [optional parts]
  if program == "make":
    execute(["make", "-n", *arguments], tmp_path)
  elif program == "pip":
    files = [name for flag, name in itertools.pairwise(arguments) if flag == "-r"]
    assert files and all((ROOT / name).is_file() for name in files)
    assert {"--no-deps", "--require-hashes"} <= set(arguments)
  elif arguments[0] == "launch.py":
    if any("configs/metamath.py" in each for each in arguments):  # its weights are the reader's
      kept = [each for each in arguments if "weights" not in each and each != "--dry_run"]
      done = execute([sys.executable, *kept, "--dry_run"], tmp_path)
      assert "lora lr 0.0001: 9175040 trainable parameters" in done.stdout or "grid" in text
      return
    # Hours, or minutes of compiling: all is resolved and printed.
    if {"--sweep", "--dry_run", "--plan"}.intersection(arguments):
      done = execute([sys.executable, *arguments, "--dry_run"], tmp_path)
      assert done.stdout.strip()
      return
    if "--status" in arguments:
      records.write_list(tmp_path, [records.Arm("key", "adapter.name=lora", 1)])
      done = execute([sys.executable, "launch.py", "--status", f"--workdir={tmp_path}"], tmp_path)
      assert "1 arms: 1 pending" in done.stdout
      return
    if any("configs/llm.py" in each for each in arguments):
      if "mine.jsonl" in text:
        assert (request.getfixturevalue("tiny_adapter") / "adapter.json").is_file()
        return
      tiny = for_tiny_model(arguments, tmp_path, request.getfixturevalue("tiny_llama"))
      done = execute([sys.executable, *tiny, "--dry_run"], tmp_path)
      assert "trainable parameters" in done.stdout
      return
    arguments = [
      f"--workdir={tmp_path}/run" if each.startswith("--workdir") else each for each in arguments
    ]
    small = SMALL if not any("adapter.rank" in each for each in arguments) else SMALL[3:]
    done = execute(
      [sys.executable, *arguments, *small, f"--config.data.data_dir={shared_data}"], tmp_path
    )
    assert "validation mse" in done.stdout
  elif arguments[:2] == ["-m", "experiments.report"] and "experiments/results" in text:
    kept = [each for each in arguments if not each.startswith("--out")]
    execute([sys.executable, *kept, f"--out={tmp_path}/report"], tmp_path)
    assert (tmp_path / "report/report.html").stat().st_size > 100_000
  elif arguments[:2] == ["-m", "experiments.report"]:
    small = ["--config=configs/regression.py:runlocal", *SMALL, f"--workdir={tmp_path}/run"]
    data = f"--config.data.data_dir={shared_data}"
    execute([sys.executable, "launch.py", *small, data], tmp_path)
    execute([sys.executable, "-m", "experiments.report", f"--workdir={tmp_path}/run"], tmp_path)
    assert (tmp_path / "run/report/report.html").stat().st_size > 10_000
  elif arguments[:2] == ["-m", "qlora_jax.studies.protocol"]:
    done = execute([sys.executable, *arguments], tmp_path)
    assert "learning rate at the edge of the grid" in done.stdout
  elif arguments[:2] == ["-m", "qlora_jax.data.text.metamath"]:
    rows = [{"query": "What is 1?", "response": "The answer is: 1"}]
    (tmp_path / "metamath.json").write_text(json.dumps(rows))
    for split in ("train", "test"):
      row = json.dumps({"question": "What is 1?", "answer": "#### 1"})
      (tmp_path / f"{split}.jsonl").write_text(row)
    given = [f"--out={tmp_path}/out", f"--metamath={tmp_path}/metamath.json", f"--gsm8k={tmp_path}"]
    done = execute([sys.executable, *arguments[:2], *given], tmp_path)
    assert "1 train, 1 validation, 1 test" in done.stdout
  elif arguments[:2] == ["-m", "qlora_jax.generate"]:
    adapter = request.getfixturevalue("tiny_adapter")
    own = [f"--adapter={adapter}" if "--adapter=" in each else each for each in arguments]
    told = "/instruction Say it.\n7\n/adapter off\n7\n/quit\n"
    done = execute([sys.executable, *own, "--max_tokens=2"], tmp_path, told)
    assert "error:" not in done.stdout + done.stderr
  elif arguments[:2] == ["-m", "experiments"] and len(arguments) == 2:
    assert "| study |" in execute([sys.executable, *arguments], tmp_path).stdout
  elif arguments[:3] == ["-m", "experiments", "keep"]:
    source = next(each.rpartition("/")[2] for each in arguments if each.startswith("--from="))
    kept = [f"--from={RESULTS / source.replace('-', '_')}", f"--results={tmp_path}"]
    execute([sys.executable, *arguments[:3], *kept], tmp_path)
    assert (tmp_path / "study.json").is_file()
  elif arguments[:2] == ["-m", "experiments"] and arguments[2] in ("documents", "notebooks"):
    # Other tests compare the committed files with what these commands write.
    assert execute([sys.executable, *arguments[:3], "--help"], tmp_path).stdout
  elif arguments[:2] == ["-m", "experiments"] and not trains(arguments):
    done = execute([sys.executable, *on_committed_results(arguments, tmp_path)], tmp_path)
    assert "| --- |" in done.stdout and f"results: {tmp_path}" in done.stdout
  elif arguments[0] == "tests/compare_checkouts.py":  # minutes of training in each checkout
    command = [sys.executable, arguments[0], "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "CHECKOUT" in done.stdout
  elif arguments[0] == "-m" and arguments[1].startswith(("benchmarks.", "experiments")):
    # Training and measuring take minutes: it is loaded with all it needs, and knows its arguments.
    given = mock.patch.object(sys, "argv", [*arguments[1:], "--help"])
    with given, pytest.raises(SystemExit) as end:
      runpy.run_module(arguments[1], run_name="__main__")
    assert end.value.code == 0
  else:
    pytest.fail(f"no rule runs this command: {text}")


def test_the_documentation_shows_commands():
  assert len(commands()) >= 6
