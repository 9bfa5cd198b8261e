"""Plans of a config: the training step is compiled, and one that does not fit gets a suggestion."""

import io
import json
import math

import jax
import pytest
from flax import linen as nn
from rich import console

from configs import llama
from qlora_jax import errors
from qlora_jax.adapters import config as adapter_config
from qlora_jax.models import architectures, decoder, families
from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.parallel import sharding
from qlora_jax.planning import (
  command,
  compile,
  hardware,
  memory,
  plan,
  program,
  report,
  search,
)
from qlora_jax.training import optimizer

TINY = decoder.DecoderConfig(
  vocabulary=512,
  width=256,
  hidden=512,
  layers=4,
  heads=4,
  groups=4,
  head_dim=128,
  base_dtype="bfloat16",
  dtype="bfloat16",
  remat="full",
)
ADAPTER = adapter_config.AdapterConfig(rank=8, atoms=16, top_k=4)
CHIPS = hardware.parse("v5e:2x2")


def tiny_job(**mesh):
  model = decoder.Decoder(TINY, ADAPTER)
  return program.Job(
    model, optimizer.OptimizerConfig(batch_size=4), mesh_lib.MeshConfig(**mesh), 256
  )


def worker_result(job, topology=CHIPS, fits=True):
  """The result of `worker.measure`, with the estimated sizes."""
  sizes = search.estimated(job, topology)
  kinds = {name: getattr(sizes, name) for name in ("base", "adapter", "optimizer", "batch")}
  memory_limit = {}
  if fits:
    kinds |= {"activations": sizes.activations, "temporaries": sizes.temporaries}
  else:
    memory_limit = {"used": 3 * int(CHIPS.chip.hbm) // 2, "limit": int(CHIPS.chip.hbm)}
  times = {"trace_seconds": 1.0, "compile_seconds": 2.0, "host_peak_bytes": 3}
  return {"fits": fits, "memory": kinds, "collectives": [], **times, **memory_limit}


def test_published_sizes_are_the_published_numbers_of_parameters():
  published = {
    "llama3.2-3b": 3.213,
    "llama3-8b": 8.03,
    "llama3-70b": 70.6,
    "llama3-405b": 405.9,
    "qwen3-8b": 8.19,
    "qwen3-32b": 32.8,
    "gemma2-27b": 27.2,
    "gemma3-27b": 27.0,
  }
  assert set(published) == set(architectures.PUBLISHED)
  for name, billions in published.items():
    shape = families.config_from_hf(architectures.config(name))
    maps = shape.layers * sum(inputs * outputs for inputs, outputs in shape.map_shapes.values())
    total = maps + shape.vocabulary * shape.width * (1 if shape.tied else 2)
    assert total / 1e9 == pytest.approx(billions, rel=3e-3), name


def test_bytes_per_chip_are_those_of_the_shards_in_training():
  job = tiny_job(fsdp=2, tensor=2)
  mesh = jax.sharding.AbstractMesh((1, 1, 2, 2), mesh_lib.AXES)
  for boxed in decoder.abstract(TINY, ADAPTER).values():
    shardings = sharding.tree(mesh, job.mesh.rules, boxed)
    expected = sum(
      math.prod(leaf_sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      for leaf, leaf_sharding in zip(
        jax.tree.leaves(nn.meta.unbox(boxed)), jax.tree.leaves(shardings), strict=True
      )
    )
    assert memory.shard_bytes(boxed, dict(mesh.shape), job.mesh.rules) == expected > 0


def test_a_step_that_does_not_fit_gets_a_compiled_suggestion(monkeypatch):
  compiled_jobs = []

  def run(job, topology, hlo=""):
    compiled_jobs.append(job)
    return worker_result(job, topology, fits=len(compiled_jobs) > 1)

  monkeypatch.setattr(compile, "run", run)
  step_plan = plan.make(tiny_job(fsdp=4), CHIPS)
  assert not step_plan["fits"] and step_plan["suggestion"]["verified"]
  assert len(compiled_jobs) == 2 and compiled_jobs[1] != compiled_jobs[0]
  verdict = plan.verdict(step_plan)
  assert "8.0 GiB more than the 16.0 GiB per chip; fits with --" in verdict


def test_the_nearest_change_comes_first_and_fits_by_the_estimate():
  job = tiny_job(fsdp=4)
  need = search.estimated(job, CHIPS).total
  scale = 1.5 * CHIPS.chip.hbm / need  # 1.5 times the memory of a chip
  changes = list(search.nearest(job, CHIPS, scale))
  assert changes and changes[0].topology == CHIPS
  for change in changes:
    assert change.bytes <= CHIPS.chip.hbm and change.flags
    assert job.rows % (mesh_lib.data_shards(_mesh(change)) * change.job.micro_batches) == 0


def _mesh(change):
  sizes = mesh_lib.resolve(change.job.mesh, change.topology.chips)
  return jax.sharding.AbstractMesh(sizes, mesh_lib.AXES)


@pytest.fixture
def planned(monkeypatch):
  """A config whose job is replaced by a tiny one."""
  monkeypatch.setattr(compile, "check", lambda: None)
  monkeypatch.setattr(plan, "job_of", lambda config, topology: tiny_job(fsdp=4))
  return llama.get_config("size=8b")


def test_the_command_shows_and_stores_the_plan(planned, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(compile, "run", lambda job, topology, hlo="": worker_result(job, topology))
  command.run(planned, "v5e:2x2", 1, None, str(tmp_path / "w"), "python launch.py --plan")
  stored = json.loads((tmp_path / "w" / command.FILE).read_text())
  shown = capsys.readouterr().out
  assert stored["fits"] and "fits with" in shown and "activations" in shown
  assert stored["hbm"]["needed"] == sum(stored["hbm"]["kinds"].values())
  assert stored["step_time"]["assumed_utilisation"] == 0.55
  assert 0 < stored["step_time"]["mfu"] < 0.56
  again = console.Console(width=200, file=io.StringIO())
  report.show(stored, again)
  assert "fits with" in again.file.getvalue()


def test_a_dry_run_estimates_without_the_compiler(planned, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(compile, "run", None)
  command.run(planned, "v5e:2x2", 1, str(tmp_path / "p.json"), None, "", dry_run=True)
  assert "by the estimate fits with" in capsys.readouterr().out
  assert not json.loads((tmp_path / "p.json").read_text())["compiled"]
  with pytest.raises(errors.UserError, match=r"by the estimate .* should fit with --topology=v5p"):
    command.run(llama_405b(monkeypatch), "v5p:2x2x1", 1, None, None, "", dry_run=True)


def llama_405b(monkeypatch):
  """A config whose job is far too large for four chips."""
  shape = families.config_from_hf(
    architectures.config("llama3-405b"), base_dtype="bfloat16", dtype="bfloat16", remat="full"
  )
  model = decoder.Decoder(shape, adapter_config.AdapterConfig(family="lora", rank=16))
  rows = optimizer.OptimizerConfig(batch_size=64)
  job = program.Job(model, rows, mesh_lib.MeshConfig(fsdp=4), 4096)
  monkeypatch.setattr(plan, "job_of", lambda config, topology: job)
  return llama.get_config("size=405b")


def test_a_step_that_does_not_fit_is_stored_and_ends_in_one_line(planned, monkeypatch, tmp_path):
  monkeypatch.setattr(
    compile, "run", lambda job, topology, hlo="": worker_result(job, topology, False)
  )
  with pytest.raises(errors.UserError, match=r"needs 8\.0 GiB more") as caught:
    command.run(planned, "v5e:2x2", 1, str(tmp_path / "p.json"), None, "")
  assert "\n" not in str(caught.value) and "does not fit either" in str(caught.value)
  assert json.loads((tmp_path / "p.json").read_text())["fits"] is False


@pytest.mark.parametrize(
  ("changes", "topology", "slices", "named"),
  [
    ({"mesh.fsdp": 3}, "v5e:2x2", 1, "fsdp 3 .* nearest: slice=1, data=1, fsdp="),
    ({"optimizer.batch_size": 6}, "v5e:2x2", 1, "batch_size: 6 rows .* use 4 or 8"),
    ({"mesh.slice": 2}, "v5e:2x2", 1, "mesh.slice: 2 is not the number of slices, 1"),
    ({"model.architecture": "llama9"}, "v5e:2x2", 1, "'llama9' is unknown; use one of .*llama3-8b"),
    ({"kind": "regression"}, "v5e:2x2", 1, "not a language model's"),
  ],
)
def test_a_wrong_config_is_one_line(changes, topology, slices, named):
  config = llama.get_config("size=8b")
  config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError, match=named):
    plan.job_of(config, hardware.parse(topology, slices))


@pytest.mark.parametrize("arg", ["size=9b", "rows=0", "wide=3", "size=8b,length=x"])
def test_a_wrong_argument_of_the_config_is_one_line(arg):
  with pytest.raises(errors.UserError, match="--config: "):
    llama.get_config(arg)


def test_the_compilers_message_on_memory_is_read():
  message = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm."
    " Used 23.15G of 15.75G hbm. Exceeded hbm capacity by 7.40G."
  )
  assert compile.exceeded(message) == {"used": int(23.15 * 2**30), "limit": int(15.75 * 2**30)}
  assert compile.exceeded("INTERNAL: something else") is None


def test_the_tpu_compiler_takes_the_training_step():
  """The one real compilation: a tiny decoder on four v5e chips, over fsdp and tensor."""
  job = tiny_job(fsdp=2, tensor=2)
  step_plan = plan.make(job, CHIPS, suggest=False)
  kinds = step_plan["hbm"]["kinds"]
  assert step_plan["fits"] and step_plan["hbm"]["needed"] == sum(kinds.values()) < 2**30
  estimate = search.estimated(job, CHIPS)
  for name in ("base", "adapter"):
    assert kinds[name] == getattr(estimate, name)
  assert kinds["optimizer"] == pytest.approx(estimate.optimizer, rel=1e-3)  # no counters
  states = 4 // 2 * 256 * TINY.width * 2 * TINY.blocks  # the inputs of the blocks, bfloat16
  assert states <= kinds["activations"] < 3 * states
  assert (
    step_plan["collectives"]["all-gather"]["count"] >= TINY.blocks
  )  # weights, one layer at a time
  assert step_plan["collectives_of_routing"] == 0


def test_a_failed_compiler_is_described_in_one_line():
  trace = b"a line\nhttps://symbolize.domain/r/?trace=7f1,7f2\n"
  assert compile._ending(-11, trace) == "crashed (SIGSEGV)"
  description = compile._ending(1, b"first\nthe reason \n\n" + trace[7:])
  assert description == "stopped with code 1: the reason"
  assert compile._ending(1, b"") == "stopped with code 1"
