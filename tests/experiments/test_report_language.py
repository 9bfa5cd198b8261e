"""A study of a language model is read, compared, drawn and shown by the report of every study."""

import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from experiments import committed, report
from experiments.analysis import language_tables
from experiments.report import figures, headline, inputs, style, tables
from qlora_jax import errors


@pytest.fixture(scope="module")
def built(tmp_path_factory, make_language_study):
  workdir = tmp_path_factory.mktemp("language")
  results = make_language_study(workdir)
  return results, workdir, report.write_report(workdir)


@pytest.fixture(scope="module")
def page(built):
  return built[2].read_text()


@pytest.fixture(scope="module")
def summary(built):
  return pd.read_parquet(built[2].parent / "summary.parquet")


def final(results, method, in_prompt, column="test_accuracy"):
  rows = results.query("stage == 'final' and arm == @method and in_prompt == @in_prompt")
  return rows[~rows["shuffled"]].set_index("seed")[column]


def line(summary, method, baseline="lora+prompt"):
  (row,) = summary.query("arm == @method and baseline == @baseline").to_dict("records")
  return row


def test_the_deciding_pair_is_compared_in_points_seed_by_seed(built, summary):
  ours = final(built[0], "queryable_prior", True)
  theirs = final(built[0], "lora", True)
  row = line(summary, style.DECIDING)
  assert row["test_accuracy"] == pytest.approx(100 * ours.mean())
  difference = 100 * (ours - theirs)
  assert row["difference"] == pytest.approx(difference.mean())
  low, high = stats.t.interval(0.95, 2, difference.mean(), stats.sem(difference))
  assert (row["difference_low"], row["difference_high"]) == pytest.approx((low, high))
  nats = final(built[0], "queryable_prior", True, "validation_nats")
  nats = nats - final(built[0], "lora", True, "validation_nats")
  assert row["validation_nats_difference"] == pytest.approx(nats.mean())
  assert np.isnan(row["relative"])


def test_a_method_is_named_by_how_the_instruction_reached_it(summary):
  assert set(summary["label"]) == {
    "LoRA",
    "LoRA + prompt",
    "Queryable",
    "Queryable + prior",
    "Queryable + prior + prompt",
    "Queryable + prior (shuffled)",
  }
  looks = [style.method(key) for key in summary["arm"].unique()]
  assert all(look.description for look in looks)
  drawn = {(look.color, str(look.line), str(look.marker)) for look in looks}
  assert len(drawn) == len(looks)


def test_what_has_no_prompt_is_also_compared_with_lora_without_it(summary):
  assert set(summary.query("baseline == 'lora'")["arm"]) == {
    "lora",
    "queryable",
    "queryable_prior",
    "queryable_prior+shuffled",
  }


def test_the_rate_and_the_basin_come_from_the_likelihood_of_the_search(built, summary):
  row = line(summary, style.DECIDING)
  assert (row["learning_rate"], row["search_runs"], row["rate_at_edge"]) == (1e-3, 3, False)
  assert 0 < row["basin_decades"] < 1


@pytest.mark.parametrize(
  ("accuracy", "lead"),
  [
    (0.8, "Queryable + prior + prompt has a higher exact match than LoRA + prompt on word tasks."),
    (0.4, "Queryable + prior + prompt has a lower exact match than LoRA + prompt on word tasks."),
  ],
)
def test_more_exact_match_wins_and_less_loses(tmp_path, make_language_study, accuracy, lead):
  ways = {("lora", True, False): (0.6, 0.6), ("queryable_prior", True, False): (accuracy, 0.6)}
  make_language_study(tmp_path, ways)
  summary = tables.summarize(inputs.read(tmp_path))
  text = headline.write(summary)
  assert text.lead == lead
  verdict = line(summary, style.DECIDING)["verdict"]
  assert verdict == ("better" if accuracy > 0.6 else "worse")


def test_a_tie_and_its_other_numbers_are_said(summary):
  text = headline.write(summary)
  assert text.lead.startswith("No clear difference in exact match between Queryable + prior")
  assert re.search(
    r"is \+0\.5 \[.*\] points \(paired, 95 % Student interval over 3 seeds\)", text.details[0]
  )
  further = next(each for each in text.details if "other numbers" in each)
  assert "known wordings" in further and "validation nats" in further
  assert any("21.0 before training" in each for each in text.details)


def test_one_seed_has_a_difference_and_no_interval(tmp_path, make_language_study):
  make_language_study(tmp_path, seeds=1)
  text = headline.write(tables.summarize(inputs.read(tmp_path)))
  assert text.lead.startswith("Too few seeds to tell")
  assert "points (one seed: no interval)" in text.details[0]


def test_scores_by_task_have_the_base_before_training(built):
  scores = tables.by_task(inputs.read(built[1]))
  row = scores.query("arm == 'lora+prompt' and split == 'test' and name == 'antonyms'").iloc[0]
  own = final(built[0], "lora", True, "test/antonyms/accuracy")
  assert row["accuracy"] == pytest.approx(100 * own.mean()) and row["num_seeds"] == 3
  bases = scores[scores["arm"].str.startswith("none")].groupby("arm")["accuracy"].mean()
  assert bases.to_dict() == pytest.approx({"none": 5.0, "none+prompt": 20.0})


def test_every_figure_is_drawn(built):
  directory = built[2].parent / "figures"
  names = {"accuracy", "tasks", "difference", "curves", "learning_rates", "routers"}
  assert {path.stem for path in directory.glob("*.svg")} == names
  for name in names:
    with Image.open(directory / f"{name}.png") as image:
      assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_the_page_shows_answers_protocol_and_no_regression(page):
  assert "&lt;b&gt;old" in page and "<b>old" not in page
  assert page.count("no idea") == 2  # the third answer before training was not kept
  assert "Queryable + prior + prompt, seed 100" in page
  assert "Model: tiny, frozen" in page and "60 steps of 4 rows" in page
  assert "Higher is better" in page and "MSE" not in page
  assert page.count("<figure id") == 6


def test_a_single_run_says_what_training_changed(tmp_path, make_language_study, monkeypatch):
  monkeypatch.setattr(figures, "DPI", 50)
  make_language_study(
    tmp_path, {("queryable_prior_query", False, False): (0.7, 0.4)}, seeds=1, rates=(1e-3,)
  )
  text = report.write_report(tmp_path).read_text()
  lead = re.search(r'class="lead">(.*?)</p>', text)[1]
  assert re.fullmatch(
    r"Queryable \+ prior \+ query raises exact match from 5\.0 % to \d+\.\d % on word tasks\.", lead
  )
  assert "One seed: no interval." in text and "Answers before and after training" in text


def test_without_a_test_split_the_likelihood_is_reported(
  tmp_path, make_language_study, monkeypatch
):
  monkeypatch.setattr(figures, "DPI", 50)
  results = make_language_study(tmp_path, {("lora", True, False): (0.6, 0.5)}, seeds=1)
  scored = [c for c in results if c.startswith(("test", "base_test"))]
  results.drop(columns=scored).to_parquet(tmp_path / "results.parquet")
  (tmp_path / "samples.parquet").unlink()
  text = report.write_report(tmp_path).read_text()
  assert "LoRA + prompt ends with negative log-likelihood 0." in text
  assert "Left out. Exact match by task" in text


def test_a_damaged_table_of_answers_is_named(tmp_path, make_language_study):
  make_language_study(tmp_path, {("lora", True, False): (0.6, 0.5)}, seeds=1)
  (tmp_path / "samples.parquet").write_bytes(b"PAR1 not really")
  with pytest.raises(errors.UserError, match=r"samples\.parquet"):
    inputs.read(tmp_path)


def test_the_documents_take_tables_from_a_language_study(built):
  results = committed.Results(built[1], "induction")
  text = language_tables.deciding(results)
  shown = f"{100 * final(built[0], 'lora', True).mean():.1f}"
  assert re.search(
    rf"\| LoRA \+ prompt \| 2,440,000 \| 3 \| .* \| {shown} \[.*\| baseline \|", text
  )
  assert "| Frozen base + prompt | 0 |" in text and "(one seed: no interval)" in text
  tasks = language_tables.by_task(results)
  assert "| antonyms | plural | translation en-fr |" in tasks
  search = built[0].query("stage == 'search' and arm == 'lora' and in_prompt")
  best = search.set_index("learning_rate")["validation_nats"].loc[1e-3]
  assert f"**{best:.3f}**" in language_tables.rates(results)
