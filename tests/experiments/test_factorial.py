"""The factorial: its cells, its effects by hand, and what is committed follows from its runs."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import study_of

from configs import factorial as config
from experiments import __main__ as command
from experiments import committed
from experiments.analysis import factorial as analysis
from experiments.report import style

SEEDS = range(100, 110)
REGRESSION, LANGUAGE = analysis.DOMAINS["regression"], analysis.DOMAINS["language"]


def test_every_cell_has_the_same_size_and_reads_what_it_says():
  found = {label: (adapter, count) for _, label, adapter, count, _ in study_of.settings_of(config)}
  assert len(found) == len(config.cells()) + 3 == 32
  assert all(abs(count / 8192 - 1) <= 0.02 for _, count in found.values())
  for label, (adapter, _) in found.items():
    instruction, routing, _ = label.split("/")
    assert adapter.uses_instruction == (instruction != "none")
    if routing != "lora":
      assert adapter.rank == config.RANK
      assert (adapter.routing == "static") == (routing == "static")
      assert (adapter.weights == "equal") == (routing == "uniform")
  true, shuffled = found["prior/on/true"][0], found["prior/on/shuffled"][0]
  assert dataclasses.asdict(true) == dataclasses.asdict(shuffled)


def rows(error, diverged=()):
  """Rows of a made-up study; `error(instruction, routing, truth)` is the error of a seed 1."""
  found, rng = [], np.random.default_rng(0)
  lora = [("none", "lora", "absent"), ("input", "lora", "true"), ("input", "lora", "shuffled")]
  noise = np.exp(0.2 * rng.normal(size=len(SEEDS)))
  for instruction, routing, trained in (*config.cells(), *lora):
    for stage, seeds in (("search", (0,)), ("final", SEEDS)):
      for place, seed in enumerate(seeds):
        unseen = error(instruction, routing, "shuffled" if trained == "shuffled" else "unseen")
        known = unseen if trained != "true" else error(instruction, routing, "true")
        found.append(
          {
            "trial_id": f"{len(found)}",
            "stage": stage,
            "task": "multi_target",
            "seed": seed,
            "arm": f"{instruction}/{routing}/{trained}",
            "learning_rate": 0.01,
            "rank": 6,
            "atoms": 18,
            "trainable_params": 8192,
            "diverged": False,
            "router/effective_support": 2.0,
            "test_mse": unseen * noise[place],
            "test_known_mse": known * noise[place],
          }
        )
  return pd.DataFrame(found)


def made_up(instruction, routing, truth):
  if truth == "shuffled" or instruction in ("none", "kl"):
    return 1.0
  gain = {"input": 2, "query": 3, "prior": 4, "prior+query": 6}[instruction]
  gain *= 2 if truth == "true" else 1
  return 1 / (gain if routing == "on" else gain**0.5)


def test_effects_are_the_ones_put_in():
  found = analysis.effects(rows(made_up), REGRESSION)

  def effect(name, truth="unseen"):
    row = found[(found["effect"] == name) & (found["truth"] == truth)].iloc[0]
    # Every seed has the same ratio: the interval is a point in per cent, and is one around it.
    assert row.percent_low == pytest.approx(row.percent) == pytest.approx(row.percent_high)
    return row.percent

  assert effect("prior − none") == pytest.approx(100 * (4 ** -(2 / 3) - 1))
  assert effect("(prior − none) × (on − static)") == pytest.approx(-50)
  assert effect("(prior − none) × (on − static)", "shuffled") == pytest.approx(0, abs=1e-9)
  assert effect("(kl − none) × (on − uniform)") == pytest.approx(0, abs=1e-9)
  assert effect("prior × query, routing on") == pytest.approx(100)  # 6 instead of 4 * 3
  assert effect("unseen − true, input, routing on", "") == pytest.approx(100)
  assert effect("on − static", "unseen") == pytest.approx(100 * (8 ** -(1 / 8) - 1))
  static = found["effect"].str.contains("query − none") & found["effect"].str.contains("static")
  assert not static.any()  # a static mixture has no query


def test_cells_hold_one_row_a_truth_and_compare_with_the_same_routing():
  cells = analysis.cells(rows(made_up), REGRESSION).set_index(["instruction", "routing", "truth"])
  assert len(cells) == 3 + 13 * 3 + 1 + 3
  assert cells.loc[("prior", "on", "unseen"), "against_untold"] == pytest.approx(-75)
  against_lora = cells.loc[("prior", "on", "true"), "against_lora_input"]
  assert against_lora == pytest.approx(100 * (4**0.5 / 8 - 1))
  assert cells.loc[("none", "on", "absent"), "error"] > 0


def test_what_is_committed_follows_from_the_committed_runs(tmp_path, capsys):
  study_of.check_derived_files("factorial", tmp_path, ["cells.csv", "effects.csv", "summary.md"])
  assert "interaction" in capsys.readouterr().out


def test_the_findings_quote_the_committed_summary():
  page, _ = study_of.page_of("factorial").split("## On a language model")
  study_of.check_quotes(page, "factorial")


def test_every_committed_cell_had_seven_rates_and_ten_seeds():
  found = committed.results("factorial").rows
  rates = found[found["stage"] == "search"].groupby("arm")["learning_rate"].nunique()
  seeds = found[found["stage"] == "final"].groupby("arm")["seed"].nunique()
  assert (rates == 7).all() and (seeds == 10).all()
  assert set(seeds.index) <= {label for _, label, *_ in study_of.settings_of(config)}
  np.testing.assert_allclose(found["trainable_params"], 8192, rtol=0.02)


def test_missing_results_are_one_line(tmp_path, capsys):
  for arguments in ([f"--results={tmp_path}"], [f"--from={tmp_path}", f"--results={tmp_path}"]):
    assert command.main(["factorial", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "results.parquet" in line


def test_a_report_draws_methods_that_it_does_not_know():
  assert style.highlighted(f"cell {index}" for index in range(20))
