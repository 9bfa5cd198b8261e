"""The ablations: sizes, references, and that what is committed follows from its runs."""

import numpy as np
import pandas as pd
import pytest
import study_of

from configs import ablations as config
from experiments import committed
from experiments.studies import ablations as analysis

UNMATCHED = {"atoms=2", "atoms=32", "key width=16", "rank=3", "rank=14"}


def test_all_but_named_levels_have_the_budgets_size_and_more_than_one_atom():
  found = study_of.settings_of(config)
  assert len(found) == sum(map(len, config.LEVELS.values()))
  for task, label, adapter, count, budget in found:
    assert (abs(count / budget - 1) <= 0.02) == (label not in UNMATCHED), (task, label)
    assert adapter.atoms > 1 and (task == "multi_target") == adapter.uses_instruction


def test_references_are_levels_of_the_same_rank_or_depth():
  found = {
    (task, label): (adapter, budget)
    for task, label, adapter, _, budget in study_of.settings_of(config)
  }
  for task, label in found:
    against = analysis.reference(task, label)
    assert (task, against) in found
    own, other = found[task, label], found[task, against]
    assert own[1] == other[1]
    if label in analysis.REFERENCES[task]:
      assert own[0].rank == other[0].rank


def made_up(levels):
  found, rng = [], np.random.default_rng(1)
  for task, method, error in levels:
    for stage, seeds in (("search", (0,)), ("final", range(100, 110))):
      for seed in seeds:
        found.append(
          {
            "trial_id": f"{len(found)}",
            "stage": stage,
            "task": task,
            "seed": seed,
            "arm": method,
            "learning_rate": 0.01,
            "rank": 7,
            "atoms": 9,
            "diverged": False,
            "trainable_params": 16_384 if method.startswith("layers") else 8192,
            "router/effective_support": 2.0,
            "test_mse": error * (1 + 0.01 * rng.normal()),
          }
        )
  return pd.DataFrame(found)


def test_a_level_is_compared_with_its_reference():
  levels = analysis.levels(
    made_up(
      [
        ("regimes", "default", 0.2),
        ("regimes", "summary=none", 0.1),
        ("regimes", "layers a block=1 of 8", 0.4),
        ("regimes", "layers a block=2 of 8", 0.5),
        ("multi_target", "default", 0.3),
        ("multi_target", "summary=none", 0.3),
      ]
    )
  )
  found = levels.set_index(["task", "factor", "level"])
  assert found.loc[("regimes", "summary", "none"), "percent"] == pytest.approx(-50, abs=2)
  assert found.loc[("regimes", "layers a block", "2 of 8"), "percent"] == pytest.approx(25, abs=2)
  assert np.isnan(found.loc[("regimes", "default", ""), "percent"])
  assert found.loc[("multi_target", "summary", "none"), "p_holm"] > 0.05
  assert found.loc[("regimes", "summary", "none"), "p_holm"] == pytest.approx(2 / 2**10)
  assert levels["matched"].all()


def test_what_is_committed_follows_from_the_committed_runs(tmp_path, capsys):
  study_of.check_derived_files("ablations", tmp_path, ["levels.csv", "summary.md"])
  assert "regimes" in capsys.readouterr().out


def test_the_findings_quote_the_committed_summary():
  study_of.check_quotes(study_of.page_of("ablations"), "ablations")


def test_every_committed_level_had_seven_rates_and_ten_seeds():
  found = committed.results("ablations").rows
  by = ["task", "arm"]
  rates = found[found["stage"] == "search"].groupby(by)["learning_rate"].nunique()
  seeds = found[found["stage"] == "final"].groupby(by)["seed"].nunique()
  assert (rates == 7).all() and (seeds == 10).all()
  assert set(seeds.index) <= {(task, label) for task, label, *_ in study_of.settings_of(config)}
