"""Fine-tuning from a config to an adapter that talks: losses, resuming, saving, bad input."""

import io
import json
import pathlib
import shutil
import subprocess
import sys

import in_process
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from jax import numpy as jnp
from safetensors import numpy as safetensors_numpy

from configs import llm
from qlora_jax import errors, finetuned
from qlora_jax import generate as talk
from qlora_jax.adapters import rerouting
from qlora_jax.data.text import pipeline
from qlora_jax.models import generation
from qlora_jax.training import loop, progress, stop
from qlora_jax.training import step as step_lib
from qlora_jax.weights import adapter_file
from qlora_jax.workloads import language, language_evaluation, language_step, routing_gain, workload

ROOT = pathlib.Path(__file__).parents[2]


def tiny(folder, adapter="queryable_prior_query", **optimizer):
  config = llm.get_config()
  config.model.weights, config.model.layers_per_block = str(folder), 1
  config.adapter.name, config.adapter.rank, config.adapter.atoms = adapter, 4, 4
  config.optimizer.update({"steps": 30, "batch_size": 8, "learning_rate": 5e-2, **optimizer})
  config.data.tasks, config.data.train_rows, config.data.length = ("plural", "uppercase"), 20, 128
  config.eval.update({"every": 5, "examples": 2, "max_tokens": 4, "batch_size": 4})
  config.instruction.dim = 4
  config.checkpoint.seconds = 0.0
  return config


def make_run(config, folder):
  trial = workload.Trial(config.seed, config.optimizer.learning_rate)
  resources = language.Resources(folder, progress.Display(total_trials=1, plain=True))
  return resources.open(workload.Cohort(config, "final", (trial,)), folder)


def train(run):
  saving = run.resources.saving(run.cohort, run.directory)
  result = loop.train(run, saving, run.display)
  return {**result["training"], "samples": result["samples"]}


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory):
  """A run that nothing stopped, and its result."""
  run = make_run(tiny(tiny_llama), tmp_path_factory.mktemp("language") / "whole")
  return run, train(run)


def drawn(folder, tmp_path, adapter="lora", parts=1):
  run = make_run(tiny(folder, adapter), tmp_path)
  params, frozen = language_step.init_params(run.model, run.base, jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(1), 1000))
  params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), params)
  text = next(
    iter(pipeline.batches(run.evaluation.tokens(run.data.splits["train"]), batch_size=8, seed=0))
  )
  return run, params, frozen, text, language_step.from_text(text, run.table, parts)


def test_training_fits_answers_and_reports_before_and_after(whole):
  run, result = whole
  assert {"test/accuracy", "test/plural/accuracy", "test_seen/accuracy"} <= set(result["after"])
  for split in ("test", "test_seen"):
    assert 0 < result["after"][f"{split}/nats"] < result["before"][f"{split}/nats"]
  assert 1 <= result["after"]["router/effective_support"] <= 4
  kept = language_evaluation.some(run.data.splits["test"], min(3, run.config.eval.examples))
  assert [(each["prompt"], each["expected"]) for each in result["samples"]] == [
    (example.prompt, example.answers[0]) for example in kept
  ]
  assert all(each["before"] != each["after"] for each in result["samples"])
  lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30]
  assert lines[-1]["train/loss"] < 0.6 * lines[0]["train/loss"]
  assert all(line["train/tokens_per_second"] > 0 for line in lines)


def test_the_routing_gain_is_the_nats_with_other_weights_on_every_token(whole):
  run, result = whole
  variables = finetuned.FineTuned(run.directory / "adapter").variables
  split = run.evaluation.tokens(
    language_evaluation.some(run.data.splits["validation"], run.config.eval.routing)
  )

  @jax.jit
  def nats(tokens, positions, segments, targets, mask, instruction):
    uniform = np.full((run.model.config.blocks, 1, 4), 0.25, "f")
    inputs = (tokens, positions, segments, instruction)
    trained = run.model.apply(variables, *inputs, method="score")
    replaced = rerouting.with_weights(run.model, variables, uniform, *inputs, method="score")
    answers = mask[..., None] * jax.nn.one_hot(targets, trained[0].shape[-1])
    return [-jnp.sum(answers * jax.nn.log_softmax(logits)) for logits, _ in (trained, replaced)]

  sums, answers = np.zeros(2), 0
  for text, _ in pipeline.evaluation_batches(split, batch_size=8):  # one example per row
    instruction = run.table[text.instruction_id]
    inputs = (text.tokens, text.positions, text.segment_ids, text.targets, text.loss_mask)
    sums += nats(*inputs, instruction)
    answers += text.loss_mask.sum()
  found = result["after"]
  np.testing.assert_allclose(
    found["routing/gain_uniform"], (sums[1] - sums[0]) / answers, rtol=1e-3, atol=1e-5
  )
  assert abs(found["routing/gain_uniform"]) > 1e-4
  assert set(routing_gain.COLUMNS) <= set(found) and found["routing/moved_weights"] > 0.01


def test_the_loss_is_the_mean_over_answer_tokens_alone(tiny_llama, tmp_path):
  run, params, frozen, text, batch = drawn(tiny_llama, tmp_path)
  nats, _ = language_step.gradients(params, frozen, batch, run.model)
  variables = step_lib.variables(run.model, params, frozen)
  logits, _ = run.model.apply(
    variables, text.tokens, text.positions, text.segment_ids, method="score"
  )
  each = -jax.nn.log_softmax(logits)[
    np.arange(8)[:, None], np.arange(text.tokens.shape[1]), text.targets
  ]
  mask = text.loss_mask
  assert 0 < mask.sum() < (text.segment_ids > 0).sum()
  np.testing.assert_allclose(nats, (each * mask).sum() / mask.sum(), rtol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_micro_batches_give_the_gradient_of_the_batch(adapter, tiny_llama, tmp_path):
  run, params, frozen, text, batch = drawn(tiny_llama, tmp_path, adapter)
  nats, grads = language_step.gradients(params, frozen, batch, run.model)
  parts = language_step.from_text(text, run.table, 4)
  assert parts.tokens.shape == (4, 2, 128)
  other, accumulated = language_step.gradients(params, frozen, parts, run.model)
  np.testing.assert_allclose(other, nats, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(accumulated), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max()) + 1e-8)


def test_a_stopped_run_goes_on_to_the_same_bits(whole, tiny_llama, tmp_path, monkeypatch):
  run, _ = whole
  stopped = make_run(tiny(tiny_llama), tmp_path)
  calls = iter(range(10**6))
  monkeypatch.setattr(stop, "requested", lambda: next(calls) >= 12)

  def check():
    if next(calls) >= 12:
      raise KeyboardInterrupt

  monkeypatch.setattr(stop, "check", check)
  with pytest.raises(KeyboardInterrupt):
    train(stopped)
  monkeypatch.undo()
  assert not (tmp_path / "adapter").exists()
  assert list((tmp_path / "checkpoints").glob("[0-9]*"))
  train(make_run(tiny(tiny_llama), tmp_path))
  files = [each / "adapter/adapter.safetensors" for each in (tmp_path, run.directory)]
  again, once = (safetensors_numpy.load_file(path) for path in files)
  assert again.keys() == once.keys()
  for name in once:
    np.testing.assert_array_equal(again[name], once[name], err_msg=name)


def test_a_saved_adapter_says_what_the_run_said(whole):
  run, _ = whole
  examples = language_evaluation.some(run.data.splits["test"], 2)
  params, frozen = language_step.init_params(run.model, run.base, jax.random.key(0))
  loaded = finetuned.FineTuned(run.directory / "adapter")
  kept = jax.tree.map(np.asarray, loaded.variables["params"])
  assert jax.tree.structure(kept) == jax.tree.structure(jax.tree.map(np.asarray, params))
  said = run.evaluation.answers(run.model, step_lib.variables(run.model, kept, frozen), examples)
  sampling = generation.SamplingConfig(max_tokens=4)
  for example, expected in zip(examples, said, strict=True):
    pieces = loaded.stream(example.prompt, example.instruction, sampling)
    assert "".join(pieces) == expected
  off = "".join(loaded.stream(examples[0].prompt, "", sampling, adapter_on=False))
  assert off not in said


def test_an_adapter_of_an_earlier_version_names_its_family_method(whole, tmp_path):
  run, _ = whole
  folder = tmp_path / "adapter"
  shutil.copytree(run.directory / "adapter", folder)
  path = folder / adapter_file.DESCRIPTION
  description = json.loads(path.read_text())
  fields = description["metadata"]["adapter"]
  fields["method"] = fields.pop("family")
  path.write_text(json.dumps(description))
  assert finetuned.FineTuned(folder).adapted.adapter == run.model.adapter


def test_an_adapter_is_refused_on_another_base(whole, other_llama):
  run, _ = whole
  with pytest.raises(errors.UserError, match=r"was trained on .*tiny.* not on .*other"):
    finetuned.FineTuned(run.directory / "adapter", str(other_llama))


def generate(monkeypatch, *arguments, told=""):
  """The exit code of the command line, run in this process."""
  saved = flagsaver.save_flag_values(talk._FLAGS)
  monkeypatch.setattr(sys, "argv", ["generate", *arguments])
  monkeypatch.setattr(sys, "stdin", io.StringIO(told))
  try:
    talk.cli()
  except SystemExit as end:
    return end.code
  finally:
    flagsaver.restore_flag_values(saved, talk._FLAGS)
  return 0


def test_the_dialogue_switches_instruction_and_adapter(whole, monkeypatch, capsys):
  folder = whole[0].directory / "adapter"
  told = "/instruction Write the plural.\notter\n/adapter off\notter\n/what\n/quit\nnever\n"
  assert generate(monkeypatch, f"--adapter={folder}", "--max_tokens=4", told=told) == 0
  *answers, last = capsys.readouterr().out.splitlines()
  assert last.startswith("commands:") and answers
  assert generate(monkeypatch, f"--adapter={folder}", "--max_tokens=4", told="otter\n") == 0
  assert "instruction: missing" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ([], "--adapter: missing"),
    (["--adapter=nowhere", "--prompt=x"], "nowhere"),
    (["--adapter=FOLDER", "--prompt=otter"], "--instruction: missing"),
    (["--adapter=FOLDER", "--prompt=x", "--top_p=2"], "top_p: 2.0"),
    (["--adapter=FOLDER", "--max_tokens=many"], "max_tokens"),
    (["--adapter=FOLDER", "--instruction=x", f"--prompt={'long ' * 400}"], "context"),
  ],
)
def test_a_mistake_in_generate_is_one_line(arguments, says, whole, monkeypatch, capsys):
  folder = str(whole[0].directory / "adapter")
  assert generate(monkeypatch, *(each.replace("FOLDER", folder) for each in arguments)) == 2
  told = capsys.readouterr().err
  assert len(told.strip().splitlines()) == 1 and says in told


def no_answer(config, folder):
  config.data.tasks = None
  (folder / "data.jsonl").write_text(
    '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": ""}\n'
  )
  config.data.name = str(folder / "data.jsonl")


def broken_line(config, folder):
  config.data.tasks = None
  (folder / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
  config.data.name = str(folder / "data.jsonl")


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (lambda config, folder: config.model.update(weights="nowhere"), "nowhere"),
    (lambda config, folder: config.model.update(weights=str(folder)), "config.json"),
    (lambda config, folder: config.model.update(layers_per_block=3), "does not divide"),
    (lambda config, folder: config.optimizer.update(micro_batches=3), "optimizer.micro_batches: 3"),
    (lambda config, folder: config.data.update(tasks=("spelling_bee",)), "spelling_bee"),
    (lambda config, folder: config.data.update(length=4), "length"),
    (lambda config, folder: config.eval.update(every=0), "eval.every: 0"),
    (lambda config, folder: config.data.update(length=257), "data.length: 257"),
    (lambda config, folder: config.mesh.update(data=2, fsdp=1), "nearest: slice=1, data=1"),
    (lambda config, folder: config.model.update(attention="splash"), "needs a TPU"),
    (broken_line, "data.jsonl line 2: "),
    (no_answer, "data.jsonl line 2: "),
  ],
)
def test_a_mistake_in_a_config_is_one_line(change, says, tiny_llama, tmp_path):
  config = tiny(tiny_llama)
  change(config, tmp_path)
  with pytest.raises(errors.UserError) as caught:
    train(make_run(config, tmp_path / "run"))
  assert says in str(caught.value) and "\n" not in str(caught.value)


def test_launch_fine_tunes_a_users_own_file(tiny_llama, tmp_path):
  data = tmp_path / "data.jsonl"
  rows = ({"prompt": f"say {word}", "completion": word} for word in map(str, range(40)))
  data.write_text("".join(json.dumps(row) + "\n" for row in rows))
  command = [
    sys.executable,
    "launch.py",
    "--config=configs/llm.py",
    f"--workdir={tmp_path}/run",
    f"--config.model.weights={tiny_llama}",
    "--config.model.layers_per_block=1",
    "--config.adapter.rank=4",
    "--config.adapter.name=lora",
    "--config.optimizer.steps=2",
    f"--config.data.name={data}",
  ]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert f"adapter: {tmp_path}/run/adapter" in done.stdout
  (tmp_path / "run/adapter/adapter.json").read_text()
  assert "negative log-likelihood" in (tmp_path / "run/report/report.html").read_text()
  again = in_process.run([*command[1:], "--config.data.name=nowhere.jsonl"])
  assert again.returncode == 2 and "Traceback" not in again.stderr
  assert [line for line in again.stderr.splitlines() if line.startswith("error:")]
