"""The protocol's checks: a study that keeps it has no lines, each fault has one that names it."""

import json

import numpy as np
import pandas as pd
import pytest

from configs import llm, regression
from qlora_jax import sweeps
from qlora_jax.studies import protocol

RATES = tuple(np.geomspace(1e-3, 1e-1, 7))
RULES = protocol.Rules()


def study(methods=("lora", "queryable"), rates=RATES, seeds=range(100, 110), **changes):
  rows = []
  for method in methods:
    own = {"trainable_params": 8192, "steps": 1000, "task": "regimes", **changes.get(method, {})}
    for seed in (0, 1):
      rows += [
        {
          **own,
          "arm": method,
          "stage": "search",
          "seed": seed,
          "learning_rate": rate,
          "validation_mse": 1 + abs(np.log10(rate / rates[3])),
        }
        for rate in rates
      ]
    rows += [
      {**own, "arm": method, "stage": "final", "seed": seed, "learning_rate": rates[3]}
      for seed in seeds
    ]
  return pd.DataFrame(rows)


def test_a_study_that_keeps_the_protocol_has_no_lines():
  assert protocol.check(study(), RULES) == []
  assert protocol.check(study()[["stage", "task", "arm", "seed", "learning_rate"]], RULES) == []


def test_each_fault_has_one_line():
  cases = [
    (study(rates=RATES[:5]), "too few learning rates: 5, at least 7 asked (lora, queryable)"),
    (study(rates=np.geomspace(1e-3, 5e-2, 7)), "learning rates too close together: 1.7 decades"),
    (study(seeds=range(100, 104)), "too few seeds: 4, at least 10 asked (lora, queryable)"),
    (study(seeds=range(10)), "final seeds not fresh: the search has used them (lora, queryable)"),
    (study(queryable={"trainable_params": 8600}), "trainable parameters not matched: "),
    (study(queryable={"steps": 900}), "unequal steps: 900 to 1000 (regimes)"),
  ]
  for runs, line in cases:
    told = protocol.check(runs, protocol.Rules(budget=8192))
    assert any(each.startswith(line) for each in told), (line, told)
    assert len(told) == 1 or "too few learning rates" in told[0], told


def test_faults_of_the_choice_of_a_rate():
  runs = study()
  runs.loc[(runs["arm"] == "lora") & (runs["stage"] == "final"), "learning_rate"] = RATES[-1]
  assert protocol.check(runs, RULES) == [
    "learning rate at the edge of the grid: 1 of 2 searches, a rate beyond it may do better (lora)",
    "learning rate not chosen on validation: another one had the least validation loss (lora)",
  ]
  runs = study()
  runs = runs[~((runs["arm"] == "lora") & (runs["stage"] == "search"))]
  assert protocol.check(runs, RULES) == [
    "no search of the learning rate: the config's own is used (lora)"
  ]
  runs = study()
  runs = runs[~((runs["arm"] == "lora") & (runs["learning_rate"] == RATES[0]))]
  assert any(line.startswith("different learning rates") for line in protocol.check(runs, RULES))


def test_seeds_must_pair():
  runs = study()
  lora = (runs["arm"] == "lora") & (runs["stage"] == "final")
  runs.loc[lora, "seed"] += 1000
  assert protocol.check(runs, RULES) == [
    "no seed in common: methods are compared seed by seed (regimes)"
  ]


def test_full_fine_tuning_and_the_base_are_not_matched_in_size():
  runs = study(("none", "full", "lora"), full={"trainable_params": 35_000}, none={"steps": 0})
  assert protocol.check(runs, protocol.Rules(budget=8192)) == []


def test_long_lists_are_cut():
  names = tuple(f"method{number}" for number in range(8))
  (line,) = protocol.check(study(names, seeds=range(100, 104)), RULES)
  assert line.endswith("(method0, method1, method2, method3, method4 and 3 more)")


def test_variants_of_a_name_are_methods_of_their_own():
  runs = pd.concat(
    [
      study(("lora",), seeds=range(100, 102)).assign(in_prompt=True),
      study(("lora",)).assign(in_prompt=False),
    ]
  )
  (line,) = protocol.check(runs, RULES)
  assert line == "too few seeds: 2, at least 10 asked (lora+prompt)"


def test_the_rules_follow_the_config():
  config = {"kind": "language", "adapter": {"budget": 2_450_000, "rank": None}}
  assert protocol.rules_of(config) == protocol.Rules(seeds=3, budget=2_450_000)
  config["adapter"]["rank"] = 8
  assert protocol.rules_of(config).budget is None
  assert protocol.rules_of({}) == protocol.Rules()


def test_a_plan_is_checked_before_anything_is_trained():
  for arg, count in (("headline", 0), ("demo", 3)):
    config = regression.get_config(arg)
    runs = protocol.planned(config, regression.get_hyper(sweeps, arg))
    assert len(protocol.check(runs, protocol.rules_of(config))) == count
  config = llm.get_config("induction")
  points = llm.get_hyper(sweeps, "induction")
  lines = protocol.check(protocol.planned(config, points), protocol.rules_of(config))
  assert lines[0].startswith("too few learning rates: 4") and "lora+prompt" in lines[0]


def test_the_command_tells_and_with_strict_fails(tmp_path, capsys):
  study(seeds=range(100, 104)).to_parquet(tmp_path / "results.parquet")
  (tmp_path / "study.json").write_text(json.dumps({"config": {"adapter": {"budget": 8192}}}))
  assert protocol.main([f"--workdir={tmp_path}"]) == 0
  assert capsys.readouterr().out == "too few seeds: 4, at least 10 asked (lora, queryable)\n"
  assert protocol.main([f"--workdir={tmp_path}", "--strict"]) == 1
  study().to_parquet(tmp_path / "results.parquet")
  assert protocol.main([f"--workdir={tmp_path}", "--strict"]) == 0
  assert "meets the protocol" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("broken", "told"), [("results.parquet", "cannot be read"), ("", "does not exist")]
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, broken, told):
  if broken:
    (tmp_path / broken).write_text("no table")
  assert protocol.main([f"--workdir={tmp_path}"]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: --workdir: ") and told in error and error.count("\n") == 1


def test_a_table_without_a_column_is_named(tmp_path, capsys):
  study().drop(columns="seed").to_parquet(tmp_path / "results.parquet")
  (tmp_path / "study.json").write_text('{"config": {}}')
  assert protocol.main([f"--workdir={tmp_path}"]) == 2
  assert "lacks the column(s) seed" in capsys.readouterr().err
