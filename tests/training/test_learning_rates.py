"""The learning rate that a fine-tuning config does not give."""

import pytest

from configs import llm
from qlora_jax import errors, sweeps
from qlora_jax.adapters import factory, registry
from qlora_jax.studies import study


def test_every_method_has_a_default_and_full_fine_tunings_is_a_tenth_of_loras():
  for family in registry.families():
    assert 0 < family.learning_rate <= 1e-3
    for preset in family.presets:
      assert factory.learning_rate(preset.name) == family.learning_rate
  assert factory.learning_rate("full_input") == factory.learning_rate("lora_input") / 10
  assert factory.learning_rate("rslora") == pytest.approx(1e-3 / 8**0.5, rel=0.02)


@pytest.mark.parametrize(("name", "rate"), [("full", 1e-4), ("queryable_prior_query", 1e-3)])
def test_a_config_without_a_rate_trains_at_its_adapters(name, rate):
  config = llm.get_config()
  config.adapter.name = name
  assert config.optimizer.learning_rate is None
  assert study.rate_of(config) == rate
  config.optimizer.learning_rate = 0.5
  assert study.rate_of(config) == 0.5


def test_a_sweep_without_rates_takes_the_default_of_each_point():
  points = sweeps.sweep("adapter.name", ("lora", "full", "rslora"))
  rates = [rates for _, rates in study.expand(llm.get_config(), points)]
  assert rates == [[1e-3], [1e-4], [3.5e-4]]


def test_an_unknown_adapter_is_named_before_its_rate_is_asked_for():
  config = llm.get_config()
  config.adapter.name = "lorra"
  with pytest.raises(errors.UserError, match=r"adapter\.name: 'lorra' is unknown"):
    study.rate_of(config)
