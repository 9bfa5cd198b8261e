"""Cloud TPUs: the commands of a config, and a training on two workers of a stand-in."""

import json
import pathlib
import shlex
import sys

import pytest

from qlora_jax import errors
from qlora_jax.launching import options, tpu, tpu_commands

STAND_IN = pathlib.Path(__file__).parent / "gcloud_stand_in.py"


def group(**fields):
  tpu_options = options.default().tpu
  tpu_options.update({"zone": "us-east5-a", "project": "lab", **fields})
  return tpu_options


def printed(capsys, arguments=("--config=configs/llm.py:demo",), **fields):
  tpu.launch(list(arguments), "runs/one", group(**fields), True)
  return [
    shlex.split(line) for line in capsys.readouterr().out.splitlines() if line and line[0] != "#"
  ]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  folder = tmp_path / "cloud"
  (folder / "bin").mkdir(parents=True)
  for name in ("gcloud", "gcsfuse"):
    program = folder / "bin" / name
    program.write_text(f"#!{sys.executable}\n{STAND_IN.read_text()}")
    program.chmod(0o755)
  monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
  monkeypatch.setenv("STAND_IN", str(folder))
  monkeypatch.setenv("STAND_IN_WORKERS", "2")
  return folder


def test_a_tpu_vm_is_created_sent_to_installed_and_run(capsys):
  lines = printed(capsys, accelerator="v5litepod-8", spot=True)
  where = ["--project=lab", "--zone=us-east5-a"]
  described, created = lines[0][: lines[0].index("||")], lines[0][lines[0].index("||") + 1 :]
  base = ["gcloud", "compute", "tpus", "tpu-vm"]
  assert described[:6] == [*base, "describe", "qlora-jax"]
  assert created == [
    *base,
    "create",
    "qlora-jax",
    "--accelerator-type=v5litepod-8",
    "--version=v2-alpha-tpuv5-lite",
    *where,
    "--spot",
  ]
  verbs = [line[4] for line in lines[1:] if line[:4] == base]
  assert verbs == ["scp", "ssh", "ssh", "scp"]
  install, run = (line[7].removeprefix("--command=") for line in lines if line[4:5] == ["ssh"])
  assert lines[2] == [
    *base,
    "scp",
    "/tmp/qlora_jax.tar.gz",
    "qlora-jax:qlora_jax.tar.gz",
    "--worker=all",
    *where,
  ]
  assert "jax[tpu]==" in install and "--require-hashes -r requirements-data.txt" in install
  assert run == (
    "cd qlora_jax && PYTHONPATH=. .venv/bin/python launch.py"
    " --config=configs/llm.py:demo --workdir=runs/one"
  )
  assert "gcloud compute tpus tpu-vm delete qlora-jax" in " ".join(lines[-1])


def test_slices_are_one_queued_request_and_run_side_by_side(capsys):
  lines = printed(capsys, way="queued", slices=2, accelerator="v5p-16", bucket="b", delete=True)
  request = " ".join(lines[0])
  assert "--node-count=2 --node-prefix=qlora-jax" in request
  assert "--accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5" in request
  assert lines[1][:2] == ["until", "["] and "ACTIVE" in lines[1]
  runs = [line for line in lines if "launch.py --config" in " ".join(line)]
  assert [line[5] for line in runs] == ["qlora-jax-0", "qlora-jax-1"]
  assert all(line[-1] == "&" and "--workdir=bucket/runs/one" in line[7] for line in runs)
  assert all("QLORA_JAX_DISTRIBUTED=1" in line[7] for line in runs)
  assert lines[-1][3:5] == ["queued-resources", "delete"]


def test_a_gke_workload_carries_the_command(capsys):
  (line,) = printed(capsys, way="xpk", cluster="gke", topology="v5p-128", slices=2, image="i:1")
  assert line[:3] == ["xpk", "workload", "create"]
  assert {
    "--cluster=gke",
    "--tpu-type=v5p-128",
    "--num-slices=2",
    "--docker-image=i:1",
    "--env=QLORA_JAX_DISTRIBUTED=1",
  } <= set(line)
  assert line[-1].endswith("python launch.py --config=configs/llm.py:demo --workdir=runs/one")


@pytest.mark.parametrize(
  ("accelerator", "count"),
  [
    ("v4-8", 1),
    ("v4-32", 4),
    ("v5p-128", 16),
    ("v5litepod-8", 1),
    ("v5litepod-16", 4),
    ("v6e-4", 1),
    ("v6e-256", 64),
  ],
)
def test_the_name_of_an_accelerator_gives_its_workers(accelerator, count):
  assert tpu_commands.hosts(accelerator) == count


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"way": "ssh"}, "cluster.tpu.way: 'ssh'"),
    ({"accelerator": "v9-8"}, "cluster.tpu.accelerator: 'v9-8' is unknown; use one of v2, "),
    ({"accelerator": "v5p-16"}, "cluster.tpu.bucket: missing; 2 workers"),
    ({"slices": 2}, "use cluster.tpu.way=queued"),
    ({"way": "xpk"}, "cluster.tpu.cluster: missing"),
    ({"name": "Up_per"}, "cluster.tpu.name: 'Up_per'"),
  ],
)
def test_an_error_in_an_option_is_one_line(fields, message):
  with pytest.raises(errors.UserError) as caught:
    tpu.launch([], "runs/one", group(**fields), True)
  assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("way", "program"), [("vm", "gcloud"), ("xpk", "xpk")])
def test_a_missing_program_is_named_before_anything_runs(way, program, tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(errors.UserError, match=f"{program} is not on the path"):
    tpu.launch([], "runs/one", group(way=way, cluster="gke"), False)


def test_workers_get_the_flags_that_do_not_select_where_to_run():
  flags = [
    "--config=a.py:b",
    "--config.adapter.rank=4",
    "--cluster=tpu",
    "--workdir",
    "runs/one",
    "--config.cluster.tpu.zone=z",
    "--sweep",
    "--dry_run",
    "--config.mesh.fsdp",
    "8",
  ]
  assert tpu.arguments_of_workers(flags) == [
    "--config=a.py:b",
    "--config.adapter.rank=4",
    "--sweep",
    "--config.mesh.fsdp=8",
  ]


def test_two_workers_train_one_model_into_the_bucket(stand_in, tiny_llama, tmp_path):
  arguments = [
    "--config=configs/llm.py",
    f"--config.model.weights={tiny_llama}",
    "--config.model.layers_per_block=1",
    "--config.adapter.name=lora",
    "--config.adapter.rank=4",
    "--config.optimizer.steps=4",
    "--config.optimizer.batch_size=4",
    "--config.data.tasks=('plural',)",
    "--config.data.train_rows=12",
    "--config.data.length=64",
    "--config.eval.every=2",
    "--config.eval.validation=4",
    "--config.eval.examples=1",
    "--config.eval.max_tokens=1",
    "--config.eval.batch_size=1",
    "--config.mesh.fsdp=2",
  ]
  tpu_options = group(
    accelerator="v5p-16",
    bucket="results",
    setup=(),
    packages=(),
    python=sys.executable,
    delete=True,
  )
  tpu.launch(arguments, "runs/one", tpu_options, False)
  workdir = stand_in / "buckets/results/runs/one"
  assert (workdir / "adapter").is_dir()
  (result,) = workdir.glob("cohorts/*/result.json")
  assert json.loads(result.read_text())["rows"][0]["steps"] == 4
  outputs = [(stand_in / f"nodes/qlora-jax/worker-{index}/stdout").read_text() for index in (0, 1)]
  assert "adapter: " in outputs[0] and "adapter: " not in outputs[1]  # only process 0 prints
  calls = (stand_in / "calls").read_text().splitlines()
  assert [call.split()[3] for call in calls] == [
    "describe",
    "create",
    "scp",
    "ssh",
    "ssh",
    "delete",
  ]


def test_a_command_that_fails_on_a_worker_ends_with_one_line(stand_in):
  tpu_options = group(setup=("exit 7",), packages=())
  with pytest.raises(errors.UserError, match="ended with 7"):
    tpu.launch([], "runs/one", tpu_options, False)
