"""Noise and training rows: the grid, differences by hand, and that what is committed follows."""

import numpy as np
import pandas as pd
import pytest
import study_of

from configs import noise as config
from experiments import committed
from experiments.studies import noise_and_rows as analysis
from qlora_jax import sweeps
from qlora_jax.data import noise


def test_every_setting_has_both_methods_at_every_rate():
  points = pd.DataFrame(config.get_hyper(sweeps))
  by = ["data.task", "data.noise_kind", "data.noise_level", "data.train_rows"]
  counts = points.groupby(by)["adapter.name"].agg(["size", "nunique"])
  assert (counts["size"] == 14).all() and (counts["nunique"] == 2).all()
  regimes = points[points["data.task"] == "regimes"]
  assert regimes[by].drop_duplicates().shape[0] == len(noise.KINDS) * 3 * 3
  assert all(abs(count / 8192 - 1) <= 0.02 for *_, count, _ in study_of.settings_of(config))


def made_up(errors):
  """Rows of a study; `errors` has (task, method, kind, level, rows) -> the error of a seed 1."""
  found, rng = [], np.random.default_rng(0)
  scale = np.exp(0.1 * rng.normal(size=10))
  for (task, *setting), error in errors.items():
    for stage, seeds in (("search", (0,)), ("final", range(100, 110))):
      for place, seed in enumerate(seeds):
        found.append(
          {
            "stage": stage,
            "task": task,
            "seed": seed,
            "arm": config.label(*setting),
            "learning_rate": 0.01,
            "rank": 7,
            "atoms": 9,
            "trainable_params": 8192,
            "diverged": False,
            "router/effective_support": 2.0,
            "test_mse": error * scale[place] * (1 + 0.001 * rng.normal()),
          }
        )
  return pd.DataFrame(found)


def test_a_setting_is_compared_with_lora_in_the_same_noise():
  rows = made_up(
    {
      ("friedman1", "lora", "gaussian", 0.5, 256): 1.0,
      ("friedman1", "queryable", "gaussian", 0.5, 256): 1.1,
      ("regimes", "lora", "gaussian", 0.5, 256): 0.2,
      ("regimes", "queryable", "gaussian", 0.5, 256): 0.1,
      ("regimes", "lora", "outliers", 1.0, 8192): 0.4,
      ("regimes", "queryable", "outliers", 1.0, 8192): 0.4,
      ("regimes", "queryable", "student_t", 1.0, 8192): 0.4,  # whose LoRA is not trained yet
    }
  )
  found = analysis.differences(rows)
  assert list(found["task"]) == ["regimes", "regimes", "friedman1"]
  assert found["percent"].to_numpy() == pytest.approx([-50, 0, 10], abs=0.2)
  assert list(found["verdict"]) == ["better", "not significant", "worse"]
  least = 2 / 2**10
  assert found["p_holm"].to_numpy()[[0, 2]] == pytest.approx([least, least])  # one family each


def test_kinds_are_pooled_seed_by_seed():
  errors = {}
  for place, kind in enumerate(noise.KINDS):
    errors["regimes", "lora", kind, 0.5, 256] = 1.0 + place
    errors["regimes", "queryable", kind, 0.5, 256] = (1.0 + place) * (0.8 if place else 1.0)
  errors["regimes", "queryable", "gaussian", 0.5, 1024] = 1.0  # whose others are missing
  row = analysis.pooled(made_up(errors)).iloc[0]
  assert row["percent"] == pytest.approx(100 * (0.8 ** (4 / 5) - 1), abs=0.1)
  assert (row["train_rows"], row["verdict"]) == (256, "better")


def test_what_is_committed_follows_from_the_committed_runs(tmp_path, capsys):
  study_of.check_derived_files(
    "noise_and_rows", tmp_path, ["differences.csv", "pooled.csv", "summary.md"]
  )
  assert "friedman1" in capsys.readouterr().out


def test_the_findings_quote_the_committed_summary():
  study_of.check_quotes(study_of.page_of("noise_and_rows"), "noise_and_rows")


def test_every_committed_setting_had_seven_rates_and_ten_seeds():
  found = committed.results("noise").rows
  by = ["task", "arm"]
  rates = found[found["stage"] == "search"].groupby(by)["learning_rate"].nunique()
  seeds = found[found["stage"] == "final"].groupby(by)["seed"].nunique()
  assert (rates == 7).all() and (seeds == 10).all()
  assert len(seeds) == 2 * len(config.settings())
