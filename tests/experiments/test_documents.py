"""The documentation's tables are those of the committed results, and say what these say."""

import numpy as np
import pytest

from experiments import committed, documents
from experiments.report import inputs


@pytest.mark.parametrize("page", documents.PAGES)
def test_tables_equal_the_committed_results(page):
  text = (committed.ROOT / page).read_text()
  assert "<!-- table:" in text
  assert documents.filled(text) == text, "run python -m experiments documents"


def test_another_number_would_be_noticed():
  text = (committed.ROOT / "README.md").read_text()
  changed = text.replace("−16.4 %", "−61.4 %")
  assert changed != text and documents.filled(changed) == text


def test_an_unknown_table_is_an_error():
  with pytest.raises(KeyError, match="nothing"):
    documents.filled("<!-- table: nothing -->\n<!-- end -->")


def final(task, **fields):
  rows = inputs.read(committed.RESULTS / "regression").stage("final")
  rows = rows[rows["task"] == task]
  for name, value in fields.items():
    rows = rows[rows[name] == value]
  return rows.pivot(index="seed", columns="arm", values="score")


def percent(errors, ours, theirs):
  return 100 * (errors[ours].mean() / errors[theirs].mean() - 1)


def test_the_deciding_differences_recomputed_by_hand():
  regimes, targets = final("regimes", noise_level=0.5), final("multi_target")
  assert len(regimes) == len(targets) == 10
  table = documents.table("deciding")
  for errors, ours, theirs in (
    (regimes, "queryable", "lora"),
    (targets, "queryable_prior", "lora_input"),
  ):
    assert (errors[ours] < errors[theirs]).all()  # each seed
    assert f"{percent(errors, ours, theirs):+.1f}".replace("-", "−") + " %" in table


def test_every_method_had_the_same_search_and_matched_parameters():
  study = inputs.read(committed.RESULTS / "regression")
  search = study.stage("search")
  adapters = search[~search["arm"].isin(["none", "full", "full_input"])]
  sizes = adapters.groupby("arm")["trainable_params"].median()
  matched = sizes.drop("lora_xs")  # its size is rank^2 a layer: the nearest rank is further off
  np.testing.assert_allclose(matched, 8192, rtol=0.021)
  grids = adapters.groupby([*inputs.SETTING, "arm"])["learning_rate"].nunique()
  assert (grids >= 7).all()
