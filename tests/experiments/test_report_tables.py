"""The report's numbers, against independent recomputation from the raw rows."""

import io
import math

import numpy as np
import pandas as pd
import pytest
import rich.console
from scipy import stats

from experiments.report import headline, inputs, tables, terminal


def _row(summary, **want):
  rows = summary
  for column, value in want.items():
    rows = rows[rows[column] == value]
  assert len(rows) == 1, want
  return rows.iloc[0]


def _errors(results, task, method, column="test_mse"):
  rows = results.query("stage == 'final' and task == @task and arm == @method")
  return rows.set_index("seed")[column]


def test_means_and_paired_differences_match_the_raw_rows(tmp_path, make_study):
  results = make_study(tmp_path, seeds=6)
  summary = tables.summarize(inputs.read(tmp_path))
  ours, theirs = _errors(results, "regimes", "queryable"), _errors(results, "regimes", "lora")
  row = _row(summary, task="regimes", arm="queryable")
  assert row["baseline"] == "lora"
  assert row["test_mse"] == pytest.approx(ours.mean())
  assert row["difference"] == pytest.approx((ours - theirs).mean())
  assert row["relative"] == pytest.approx(100 * (ours.mean() / theirs.mean() - 1))
  assert row["spread"] == pytest.approx(ours.std(ddof=1))
  # Six seeds have 6^6 equally likely resamples: enumerate them all.
  draws = np.stack(np.meshgrid(*[(ours - theirs).to_numpy()] * 6)).reshape(6, -1).mean(axis=0)
  low, high = np.quantile(draws, [0.025, 0.975])
  width = high - low
  assert row["difference_low"] == pytest.approx(low, abs=0.05 * width)
  assert row["difference_high"] == pytest.approx(high, abs=0.05 * width)
  # The sign-flip test: how many of the 64 flips have as large a mean.
  flips = np.stack(np.meshgrid(*[(-1, 1)] * 6)).reshape(6, -1).T
  means = np.abs((flips * (ours - theirs).to_numpy()).mean(axis=1))
  expected = np.mean(means >= abs((ours - theirs).mean()) - 1e-12)
  assert row["p_value"] == pytest.approx(expected)
  # Holm's, of three methods compared with LoRA: the others differ clearly, this one does not.
  assert row["p_holm"] == pytest.approx(expected)
  assert row["trainable_params"] == 7288
  assert row["learning_rate"] == 0.01


def test_few_seeds_have_students_intervals_and_p_values(tmp_path, make_study):
  results = make_study(tmp_path, seeds=4)
  row = _row(tables.summarize(inputs.read(tmp_path)), task="regimes", arm="queryable")
  differences = _errors(results, "regimes", "queryable") - _errors(results, "regimes", "lora")
  expected = stats.ttest_1samp(differences, 0.0)
  ends = expected.confidence_interval(0.95)
  assert (row["difference_low"], row["difference_high"]) == pytest.approx((ends.low, ends.high))
  assert row["p_value"] == pytest.approx(expected.pvalue)


def test_a_task_without_noise_free_target_is_compared_on_the_observed_one(tmp_path, make_study):
  results = make_study(tmp_path)
  summary = tables.summarize(inputs.read(tmp_path))
  row = _row(summary, task="bikeshare", arm="lora")
  assert row["test_mse"] == pytest.approx(
    _errors(results, "bikeshare", "lora", "test_noisy_mse").mean()
  )
  assert not row["noise_free"]


def test_search_columns_count_divergence_and_basin(tmp_path, make_study):
  results = make_study(tmp_path)
  # Within 5 % of 1: from 3e-3 to 1e-2, and a quarter of the way to the neighbours at 1.2.
  losses = {1e-3: 1.2, 3e-3: 1.0, 1e-2: 1.0, 3e-2: 1.2, 1e-1: 4.0}
  ours = (results["stage"] == "search") & (results["arm"] == "queryable")
  results.loc[ours, "validation_mse"] = results.loc[ours, "learning_rate"].map(losses)
  results.to_parquet(tmp_path / "results.parquet")
  summary = tables.summarize(inputs.read(tmp_path))
  robust = _row(summary, task="regimes", arm="queryable")
  assert robust["basin_decades"] == pytest.approx(math.log10(10 / 3) + 0.5 * math.log10(3))
  assert robust["diverged_share"] == 0
  lora = _row(summary, task="regimes", arm="lora")
  assert lora["diverged_share"] == pytest.approx(1 / 5)  # at the largest rate, on every seed
  assert lora["search_runs"] == 10
  base = _row(summary, task="regimes", arm="none")
  assert math.isnan(base["learning_rate"]) and math.isnan(base["basin_decades"])


@pytest.mark.parametrize(
  ("interval", "failed", "word"),
  [
    ((-1, -2, -0.1), 0, "better"),
    ((1, 0.1, 2), 0, "worse"),
    ((0.5, -0.1, 1), 0, "no difference"),
    ((-1, -2, -0.1), 1, "diverged"),
    ((math.nan,) * 3, 0, "too few seeds"),
  ],
)
def test_verdict_follows_the_interval(interval, failed, word):
  assert tables.verdict(interval, failed) == word


def test_a_diverged_final_run_never_wins(tmp_path, make_study):
  make_study(tmp_path, seeds=4, failures=[("queryable", 51)])
  summary = tables.summarize(inputs.read(tmp_path))
  row = _row(summary, task="regimes", arm="queryable")
  assert (row["failed_runs"], row["num_pairs"], row["verdict"]) == (1, 3, "diverged")
  assert row["difference_high"] < 0  # the runs that finished were better, and still
  text = headline.write(summary)
  assert text.lead == "A final run of Queryable diverged on all 3 data sets."
  assert not any("lowest mean error" in line and "Queryable" in line for line in text.details)


def test_a_method_of_which_every_run_diverged_stays_in_the_headline(tmp_path, make_study):
  make_study(tmp_path, failures=[("queryable", 50 + seed) for seed in range(3)])
  text = headline.write(tables.summarize(inputs.read(tmp_path)))
  assert text.lead == "A final run of Queryable diverged on all 3 data sets."


def test_multi_target_is_compared_with_both_baselines(tmp_path, make_study):
  make_study(tmp_path, methods=("lora", "lora_input", "queryable"))
  summary = tables.summarize(inputs.read(tmp_path))
  own = summary[summary["arm"] == "queryable"]
  assert list(own.query("task == 'multi_target'")["baseline"]) == ["lora", "lora_input"]
  assert list(own.query("task == 'regimes'")["baseline"]) == ["lora"]
  other = tables.summarize(inputs.read(tmp_path), {"": ["queryable"], "regimes": ["lora_input"]})
  assert set(other.query("task == 'bikeshare'")["baseline"]) == {"queryable"}
  assert set(other.query("task == 'regimes'")["baseline"]) == {"lora_input"}


def test_headline_compares_like_with_like_where_the_instruction_decides(tmp_path, make_study):
  methods = ("lora", "lora_input", "queryable", "queryable_prior")
  factors = {"lora": 2.0, "lora_input": 1.0, "queryable": 0.5, "queryable_prior": 1.5}
  make_study(tmp_path, ("multi_target", "regimes"), methods, seeds=6, factors=factors)
  text = headline.write(tables.summarize(inputs.read(tmp_path)))
  # Worse than LoRA with the instruction, although better than LoRA without it.
  assert text.lead == (
    "Compared with LoRA, Queryable has a lower test error on 1 and a higher one on 1 of 2 data "
    "sets."
  )
  assert text.details[1] == (
    "On multi target, Queryable stands for Queryable + prior and LoRA stands for LoRA with "
    "instruction."
  )


def test_headline_tells_how_steady_both_are(tmp_path, make_study):
  results = make_study(tmp_path, ("regimes",), seeds=4)
  text = headline.write(tables.summarize(inputs.read(tmp_path)))
  ratio = _errors(results, "regimes", "queryable").std() / _errors(results, "regimes", "lora").std()
  assert any("0 % of the search runs of Queryable diverged, 20 % of" in d for d in text.details)
  assert any(f"spreads {ratio:.2g} times as widely" in d for d in text.details)


def test_a_chosen_rate_at_the_edge_of_the_search_is_said(tmp_path, make_study):
  results = make_study(tmp_path, ("regimes",))
  assert not tables.summarize(inputs.read(tmp_path))["rate_at_edge"].any()
  ours = (results["stage"] == "final") & (results["arm"] == "queryable")
  results.loc[ours, "learning_rate"] = 0.1
  results.to_parquet(tmp_path / "results.parquet")
  text = headline.write(tables.summarize(inputs.read(tmp_path)))
  assert any("In 1 of 3 cases" in d and "(Queryable)" in d for d in text.details)


def test_one_seed_gives_a_mean_without_verdict(tmp_path, make_study):
  make_study(tmp_path, seeds=1)
  summary = tables.summarize(inputs.read(tmp_path))
  row = _row(summary, task="regimes", arm="queryable")
  assert math.isfinite(row["test_mse"]) and math.isnan(row["test_mse_low"])
  assert row["verdict"] == "too few seeds"
  assert headline.write(summary).lead.startswith("Too few seeds")


@pytest.mark.parametrize(
  ("factor", "lead"),
  [
    (0.7, "Queryable has a lower test error than LoRA on all 3 data sets."),
    (1.5, "Queryable has a higher test error than LoRA on all 3 data sets."),
    (1.0, "No clear difference in test error between Queryable and LoRA on 3 data sets."),
  ],
)
def test_headline_says_who_wins_also_when_queryable_loses(tmp_path, make_study, factor, lead):
  factors = {"queryable": factor, "lora": 1.0}
  results = make_study(tmp_path, seeds=6, factors=factors)
  if factor == 1.0:  # exact ties up to a sign that alternates
    final = (results["stage"] == "final") & (results["arm"] == "queryable")
    lora = (results["stage"] == "final") & (results["arm"] == "lora")
    wobble = np.where(np.arange(final.sum()) % 2, 1.01, 0.99)
    for column in ("test_mse", "test_noisy_mse"):
      results.loc[final, column] = results.loc[lora, column].to_numpy() * wobble
    results.to_parquet(tmp_path / "results.parquet")
  text = headline.write(tables.summarize(inputs.read(tmp_path)))
  assert text.lead == lead
  assert "6 seeds" in text.details[0]


def test_headline_without_a_comparison_says_so(tmp_path, make_study):
  make_study(tmp_path, methods=("none", "lora"))
  text = headline.write(tables.summarize(inputs.read(tmp_path)))
  assert "does not compare Queryable" in text.lead


@pytest.mark.parametrize(
  ("value", "text"),
  [(0.09321, "0.0932"), (12.3456, "12.3"), (0, "0"), (1.5e-6, "1.50e-06"), (math.nan, "–")],
)
def test_numbers_have_three_significant_digits(value, text):
  assert tables.number(value) == text


def test_markdown_has_one_line_a_method_and_equal_columns(tmp_path, make_study):
  make_study(tmp_path)
  summary = tables.summarize(inputs.read(tmp_path))
  lines = [line for line in tables.markdown(summary).splitlines() if line.startswith("|")]
  assert len(lines) == 3 * 2 + len(summary)
  assert len({line.count("|") for line in lines}) == 1
  assert pd.isna(summary.loc[summary["arm"] == "lora", "difference"]).all()


def test_the_terminal_shows_every_row_with_its_interval(tmp_path, make_study):
  make_study(tmp_path, seeds=4)
  summary = tables.summarize(inputs.read(tmp_path))
  summary.to_parquet(tmp_path / "summary.parquet")
  console = rich.console.Console(file=io.StringIO(), width=100)
  terminal.show(tmp_path / "report.html", console)
  lines = console.file.getvalue().splitlines()
  for row in summary.to_dict("records"):
    interval = tables.with_interval(row["test_mse"], row["test_mse_low"], row["test_mse_high"])
    assert any(row["label"] in line and interval in line for line in lines), row["label"]
  assert max(map(len, lines)) <= 100
