"""The stream study: its quantities on matrices by hand, and its summary from its results."""

import re

import numpy as np
import pandas as pd
import pytest
import study_of

from experiments import committed
from experiments import resumable_training as resumable
from experiments.analysis import stream_quantities as quantities
from experiments.analysis import stream_tables as tables
from experiments.analysis import stream_training as train

# L_ij: error on task j after task i.
ERRORS = np.array([[0.1, 0.9, 0.8], [0.3, 0.2, 0.6], [0.5, 0.1, 0.3]])
BASE = np.array([1.0, 1.0, 0.5])


def test_the_quantities_of_a_matrix_by_hand():
  assert quantities.average_error(ERRORS) == pytest.approx(0.3)
  assert quantities.learned_error(ERRORS) == pytest.approx(0.2)
  assert quantities.backward_transfer(ERRORS) == pytest.approx(((0.1 - 0.5) + (0.2 - 0.1)) / 2)
  assert quantities.forward_transfer(ERRORS, BASE) == pytest.approx(((1.0 - 0.9) + (0.5 - 0.6)) / 2)
  alone = np.array([9.0, 0.15, 0.35])  # the first is left out
  assert quantities.intransigence(ERRORS, alone) == pytest.approx((0.05 - 0.05) / 2)


def test_nothing_is_forgotten_when_nothing_changes():
  kept = np.repeat(ERRORS[-1:], 3, axis=0)
  assert quantities.backward_transfer(kept) == 0.0
  assert quantities.forward_transfer(np.repeat(BASE[None], 3, axis=0), BASE) == 0.0


@pytest.mark.parametrize("task", train.ADAPTERS)
def test_a_seed_meets_every_part_once_in_an_order_of_its_own(task):
  orders = [tuple(train.order_of(task, seed)) for seed in range(20)]
  count = len(resumable.part_names(task))
  assert all(sorted(order) == list(range(count)) for order in orders)
  assert len(set(orders)) > 15 and orders[3] == tuple(train.order_of(task, 3))


def test_matrices_come_back_as_they_were_written():
  rows = [
    {
      "task": "t",
      "arm": "LoRA",
      "seed": seed,
      "after": i,
      "place": j,
      "part": f"p{j}",
      "mse": ERRORS[i, j] + seed,
      "base_mse": BASE[j],
    }
    for seed in (7, 3)
    for i in range(3)
    for j in range(3)
  ]
  found, base = tables.matrices(pd.DataFrame(rows), "t", "LoRA")
  np.testing.assert_allclose(found, [ERRORS + 3, ERRORS + 7])
  np.testing.assert_allclose(base, [BASE, BASE])


def test_frozen_arms_differ_from_free_ones_in_what_they_freeze_alone():
  arms = {arm.name: arm for arm in train.ARMS}
  assert arms[tables.BASELINE].family == "lora" and arms[tables.BASELINE].order == "stream"
  frozen = arms["Queryable, atoms frozen from the start"]
  assert frozen.first == frozen.later == ("atoms",)
  assert arms["Queryable, atoms frozen after the first"].first == ()
  assert {arms[name].order for name in tables.ALONE.values()} == {"alone"}


def test_the_committed_summary_is_what_the_committed_results_give():
  results = committed.results("stream")
  found = tables.read(results)
  summary = tables.summarise(found)
  kept = results.table("summary.csv")
  pd.testing.assert_frame_equal(summary, kept, rtol=1e-4, atol=1e-6, check_dtype=False)
  assert (results.folder / "summary.md").read_text() == tables.markdown(summary)
  final = found["runs"][found["runs"]["stage"] == "final"]
  assert (final.groupby(["task", "arm"])["seed"].nunique() == 10).all()


def test_every_interval_of_the_page_is_in_the_summary():
  told = re.findall(r"[+-]?[\d.]+ \[[^\]]+\]", study_of.page_of("stream"))
  summary = (committed.RESULTS / "stream" / "summary.md").read_text()
  assert told and not [each for each in told if each not in summary]
