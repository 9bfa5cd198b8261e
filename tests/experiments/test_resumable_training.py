"""Resumable units of work, parts of tasks, and the choice of a rate."""

import numpy as np
import pytest

from configs import depth, stream
from experiments import resumable_training as resumable
from qlora_jax import sweeps
from qlora_jax.data import functions, pipeline
from qlora_jax.studies import study
from qlora_jax.workloads import regression_config as settings


def test_a_unit_is_made_once_and_the_limit_leaves_the_rest(tmp_path, capsys):
  config = depth.get_config("runlocal")
  made = []

  def unit(name):
    return lambda: made.append(name) or {"value": [name]}

  first = resumable.Bench(config, tmp_path, 3, limit=1)
  assert first.once("a → b", unit("a")) == {"value": ["a"]}
  assert first.once("c", unit("c")) == {}
  again = resumable.Bench(config, tmp_path, 3)
  assert [again.once(name, unit(name)) for name in ("a → b", "c")] == [
    {"value": ["a"]},
    {"value": ["c"]},
  ]
  assert made == ["a", "c"] and "2/3 c:" in capsys.readouterr().err


def test_the_rate_is_chosen_on_validation_and_trained_on_fresh_seeds():
  config = depth.get_config("runlocal")
  asked = []

  def train(runs):
    asked.append(runs)
    return [
      {"seed": seed, "learning_rate": rate, "validation_mse": abs(rate - 0.02), "test_mse": -rate}
      for seed, rate in runs
    ]

  rows = resumable.search_and_final(config, (0.01, 0.02, 0.1), train)
  assert asked[1] == ((100, 0.02), (101, 0.02))
  assert [row["stage"] for row in rows] == ["search"] * 3 + ["final"] * 2


def test_octants_are_the_regions_but_for_rows_at_their_border():
  rng = np.random.default_rng(0)
  x = rng.random((4096, 10))
  features = ((x - x.mean(axis=0)) / x.std(axis=0)).astype("f")
  zeros = np.zeros(4096, np.int32)
  arrays = pipeline.Arrays(features, *np.zeros((2, 4096), "f"), zeros, zeros)
  assert np.mean(resumable.parts("regimes", arrays) == functions.region(x)) > 0.97
  assert len(resumable.part_names("regimes")) == functions.NUM_REGIONS
  np.testing.assert_array_equal(resumable.parts("multi_target", arrays), zeros)


def test_means_by_part():
  own = np.array([0, 1, 2, 3, 4, 5, 5])
  found = resumable.by_part(np.arange(7.0), own, "multi_target")
  np.testing.assert_allclose(found, [0, 1, 2, 3, 4, 5.5])


def test_runs_of_one_seed_share_its_rows():
  runs = ((7, 0.1), (3, 0.1), (7, 0.2))
  assert resumable.seeds_of(runs) == (3, 7)
  np.testing.assert_array_equal(resumable.seed_rows(runs), [1, 0, 1])


@pytest.mark.parametrize("module", [depth, stream])
@pytest.mark.parametrize("variant", ["", "runlocal"])
def test_every_point_of_the_configs_resolves(module, variant):
  config = module.get_config(variant)
  expanded = study.expand(config, module.get_hyper(sweeps, variant))
  assert {len(rates) for _, rates in expanded} == {2 if variant else 7}
  for own, _ in expanded:
    settings.resolve(own)
