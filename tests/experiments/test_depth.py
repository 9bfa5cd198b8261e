"""The depth study: its quantities, and that its summary is what its results give."""

import re

import numpy as np
import pandas as pd
import pytest
import study_of

from experiments import committed
from experiments.analysis import depth_quantities as quantities
from experiments.analysis import depth_tables as tables
from experiments.analysis import depth_training as train

RNG = np.random.default_rng(0)


def simplex(*shape):
  return RNG.dirichlet(np.ones(shape[-1]), shape[:-1])


def test_similarities_of_equal_disjoint_and_known_weights():
  p, q = np.array([0.5, 0.5, 0.0, 0.0]), np.array([0.0, 0.0, 0.5, 0.5])
  assert quantities.js_similarity(p, p) == 1.0 and quantities.js_similarity(p, q) == 0.0
  assert quantities.centred_cosine(p, p) == pytest.approx(1.0)
  assert quantities.centred_cosine(p, q) == pytest.approx(-1.0)
  assert quantities.centred_cosine(p, np.full(4, 0.25)) == 0.0
  one, half = np.array([1.0, 0.0]), np.array([0.5, 0.5])  # JSD = H(3/4) - H(1/2)/2 by hand
  by_hand = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)) - 0.5
  assert quantities.js_similarity(one, half) == pytest.approx(1 - by_hand)


def test_blocks_that_share_atoms_stand_out_from_renamed_atoms_and_others_do_not():
  same = np.repeat(simplex(2, 1, 12) ** 3, 5, axis=1)
  same /= same.sum(axis=-1, keepdims=True)
  own = simplex(2, 5, 12)
  for similarity in quantities.SIMILARITIES.values():
    assert quantities.across_blocks(same, similarity) == pytest.approx(1.0)
    baseline = quantities.atoms_renamed(same, similarity, 50)
    assert baseline.max() < 0.97
    others = quantities.atoms_renamed(own, similarity, 50)
    inside = quantities.across_blocks(own, similarity)
    assert abs(inside - others.mean()) < 5 * others.std()
  each = [quantities.centred_cosine(own[:, a], own[:, b]) for a in range(5) for b in range(a)]
  assert quantities.across_blocks(own, quantities.centred_cosine) == pytest.approx(np.mean(each))


def test_parts_are_compared_within_a_block():
  weights = simplex(3, 2, 6)
  pairs = [(0, 1), (0, 2), (1, 2)]
  by_hand = [
    quantities.js_similarity(weights[a, b], weights[c, b]) for a, c in pairs for b in range(2)
  ]
  assert quantities.across_parts(weights, quantities.js_similarity) == pytest.approx(
    np.mean(by_hand)
  )


def test_shares_are_means_over_the_examples_of_a_part():
  weights, part = simplex(2, 7, 4), np.array([0, 2, 0, 1, 1, 2, 0])
  found = quantities.shares(weights, part, 3)
  assert found.shape == (3, 2, 4)
  np.testing.assert_allclose(found[1, 1], weights[1, 3:5].mean(axis=0))
  np.testing.assert_allclose(found.sum(axis=-1), 1.0)


def test_a_uniform_memory_has_full_support_and_a_collapsed_one_has_one_atom():
  assert quantities.effective_support(np.full((2, 3, 5), 0.2)) == pytest.approx(5)
  assert quantities.effective_support(np.eye(5)) == pytest.approx(1)


def test_an_atom_that_serves_one_part_is_told_from_one_that_serves_all():
  assert tables.most_on_one_part(np.eye(3)) == pytest.approx(1)
  assert tables.most_on_one_part(np.ones((3, 2))) == pytest.approx(1 / 3)
  assert tables.most_on_one_part(np.array([[1.0, 2.0], [-5.0, 2.0]])) == pytest.approx(0.75)


def test_an_atom_that_matters_in_one_block_is_told_from_one_that_matters_in_all():
  assert tables.blocks_served(np.eye(4)) == pytest.approx(1)
  assert tables.blocks_served(np.ones((4, 3))) == pytest.approx(4)
  assert tables.blocks_served(np.array([[3.0, 0.0], [1.0, -2.0]])) == pytest.approx(16 / 10)


def test_rises_are_relative_to_the_whole_network():
  rows = [
    {"setting": "s", "seed": 1, "block": b, "atom": a, "part": "all", "mse": mse}
    for b, a, mse in [(-1, -1, 2.0), (-1, 0, 3.0), (-1, 1, 2.0), (0, 0, 2.5), (0, 1, 1.0)]
  ]
  found = tables.effects({"effects": pd.DataFrame(rows)}, "s")
  np.testing.assert_allclose(found[1], [[50.0, 0.0], [25.0, -50.0]])


def test_an_arm_that_trains_the_router_alone_freezes_all_else_and_takes_what_it_says():
  arms = {arm.name: arm for arm in train.ARMS}
  for name in ("router alone, source memory", "router alone, random memory"):
    assert set(arms[name].frozen) == {"memory", "other"} and "router" not in arms[name].taken
  assert "memory" in arms["router alone, source memory"].taken
  assert arms["router alone, random memory"].taken == ("other",)
  assert set(tables.AGAINST) <= set(arms)


def test_the_committed_summary_is_what_the_committed_results_give():
  results = committed.results("depth")
  found = tables.read(results)
  summary = tables.summarise(found)
  kept = results.table("summary.csv")
  pd.testing.assert_frame_equal(
    summary, kept, rtol=1e-4, atol=1e-6, check_dtype=False, check_like=False
  )
  assert (results.folder / "summary.md").read_text() == tables.markdown(summary)
  final = found["runs"][found["runs"]["stage"] == "final"]
  assert (final.groupby(["kind", "setting", "arm"])["seed"].nunique() == 10).all()


def test_every_interval_of_the_page_is_in_the_summary():
  told = re.findall(r"[+-]?[\d.]+ \[[^\]]+\]", study_of.page_of("depth"))
  summary = (committed.RESULTS / "depth" / "summary.md").read_text()
  assert told and not [each for each in told if each not in summary]
