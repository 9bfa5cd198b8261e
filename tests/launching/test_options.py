"""The group `cluster`: times, errors, and independence of results from it."""

import pathlib
import subprocess
import sys

import pytest

from configs import llm, regression
from qlora_jax import errors
from qlora_jax.launching import options, slurm

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
  ("text", "count"),
  [
    ("60", 60),
    ("90:30", 91),
    ("12:00:00", 720),
    ("1-0", 1440),
    ("1-2:30", 1590),
    ("2-00:00:01", 2881),
  ],
)
def test_a_time_is_read_as_sbatch_reads_it(text, count):
  assert options.minutes(text) == count


@pytest.mark.parametrize("text", ["soon", "1:2:3:4", "", "-5", "0:30"])
def test_an_invalid_time_is_named(text):
  with pytest.raises(errors.UserError, match=r"cluster\.slurm\.time"):
    options.minutes(text)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"nodes": 0}, "cluster.slurm.nodes: 0"),
    ({"requeues": -1}, "cluster.slurm.requeues: -1 is below 0"),
    ({"memory_gb": 0.0}, "cluster.slurm.memory_gb: 0.0"),
    ({"nodes": 2, "gpus_per_node": 8}, "cluster.slurm.tasks_per_node: 1 for 8 GPUs"),
    ({"sbatch": ("reservation=x",)}, "cluster.slurm.sbatch: 'reservation=x'"),
  ],
)
def test_an_error_in_an_option_is_one_line(fields, message):
  slurm_options = options.default().slurm
  slurm_options.update(fields)
  with pytest.raises(errors.UserError) as caught:
    options.check_slurm(slurm_options)
  assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("module", [regression, llm])
def test_the_trained_config_has_no_group_cluster(module):
  config, cluster = options.split(module.get_config())
  assert "cluster" not in config and cluster.slurm.time == "1:00:00"
  again, other = options.split(config)  # a config without the group gets the defaults
  assert again == config and other.to_dict() == options.default().to_dict()


def test_a_script_has_the_options_of_the_config(tmp_path):
  slurm_options = options.default().slurm
  slurm_options.update(
    {
      "time": "2:00:00",
      "nodes": 2,
      "tasks_per_node": 4,
      "gpus_per_node": 4,
      "cpus_per_task": 8,
      "memory_gb": 1.5,
      "partition": "gpu",
      "account": "lab",
      "setup": ("module load cuda",),
      "sbatch": ("--reservation=night", "--exclusive"),
      "signal_seconds": 30,
    }
  )
  text = slurm.script(slurm.make_executor(tmp_path, slurm_options, "my run", 3), 5)
  script_options = {
    line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line
  }
  assert {
    "--array=0-4%3",
    "--time=120",
    "--nodes=2",
    "--ntasks-per-node=4",
    "--gpus-per-node=4",
    "--cpus-per-task=8",
    "--mem=1536M",
    "--partition=gpu",
    "--account=lab",
    "--requeue",
    "--reservation=night",
    "--exclusive",
    "--signal=USR2@30",
    "--job-name=my_run",
  } <= script_options
  lines = text.splitlines()
  assert lines.index("module load cuda") < next(i for i, e in enumerate(lines) if "srun" in e)
  assert any(line.startswith("srun ") and "--cpus-per-task=8" in line for line in lines)
  single = slurm.script(slurm.make_executor(tmp_path, slurm_options, "my run", 3), 1)
  assert "--array" not in single
  assert not list(tmp_path.iterdir())


def test_a_machine_without_slurm_is_an_error_of_one_line(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(errors.UserError, match=r"sbatch is not on the path; .* --cluster=local"):
    options.require_slurm()


def test_a_regression_of_several_processes_is_refused():
  config, cluster = options.split(regression.get_config("runlocal"))
  cluster.slurm.tasks_per_node = 2
  with pytest.raises(errors.UserError, match="a regression trains in one"):
    slurm.check(config, None, cluster.slurm)


def test_the_command_without_slurm_ends_with_code_2_and_writes_nothing(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      "launch.py",
      "--config=configs/regression.py:runlocal",
      "--cluster=slurm",
      f"--workdir={tmp_path}/run",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    env={"PATH": str(tmp_path)},
  )
  assert done.returncode == 2
  assert done.stderr.startswith("error: --cluster=slurm: sbatch is not on the path")
  assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())
