"""PEFT's published setting resolves without weights, data or network, at its published size."""

import in_process
import numpy as np
import pytest

from configs import metamath
from qlora_jax import errors, sweeps
from qlora_jax.data.text import formatting, records
from qlora_jax.studies import protocol, study

PUBLISHED = 9_175_040  # num_trainable_params of PEFT's result file


def test_a_dry_run_resolves_the_published_number_of_parameters(tmp_path):
  done = in_process.run(["launch.py", "--config=configs/metamath.py", "--dry_run"])
  assert done.returncode == 0, done.stderr
  assert done.stdout == (
    f"data/metamath/lora lr 0.0001: {PUBLISHED} trainable parameters, rank 32\n"
  )


def test_the_setting_is_pefts():
  config = metamath.get_config()
  settings = study.resolve(config, abstract=True)
  adapter, optimizer = settings.model.adapter, settings.optimizer
  assert (adapter.family, adapter.rank, adapter.alpha) == ("lora", 32, 64.0)
  assert settings.model.config.adapted == ("q", "v")
  assert (optimizer.steps, optimizer.batch_size, optimizer.warmup) == (5000, 4, 0.1)
  assert (optimizer.weight_decay, optimizer.clip, config.optimizer.learning_rate) == (0.1, 1, 1e-4)
  assert (config.data.length, config.data.pack) == (768, False)


def test_the_grid_keeps_the_protocol_but_for_the_edges_that_only_training_tells():
  rates = metamath.LEARNING_RATES
  assert len(rates) == 12 and rates[0] == 1.1e-5 and rates[-1] == 6.3e-3
  ratios = np.diff(np.log(rates))
  np.testing.assert_allclose(ratios, ratios.mean(), rtol=0.1)
  config = metamath.get_config("grid")
  runs = protocol.planned(config, metamath.get_hyper(sweeps, "grid"))
  assert len(runs) == 2 * (12 + 3)
  assert protocol.check(runs, protocol.rules_of(config)) == []


def test_prompts_are_written_in_the_template():
  render = formatting.template_render(metamath.TEMPLATE, "<s>")
  example = records.Example("", "1+1?", ("2",), "gsm8k", 0)
  messages = formatting.chat_messages(example, instruction_in_prompt=True)
  prompt = "<s>Question: 1+1? Think step by step.\nAnswer:"
  assert render(messages[:1], True) == prompt
  assert render(messages, False) == f"{prompt}2\n"


def test_a_template_without_a_place_for_the_prompt_is_refused():
  config = metamath.get_config()
  config.data.template = "Question:"
  with pytest.raises(errors.UserError, match=r"data\.template: 'Question:' has no {prompt}"):
    study.resolve(config, abstract=True)
