"""The deciding pair at seven rates: its tables and claims on made-up runs, by hand."""

import re
import types

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments import committed, routing_gain
from experiments.analysis import language_deciding as deciding

LORA, ROUTED = deciding.BASELINE, deciding.ROUTED
NATS = (1.0, 1.02, 0.99)


def runs(difference, gain, gains_by_rate=(0.0, 0.2)):
  """Three final seeds of both methods and a search of two rates; `gain` by seed."""
  final = [
    {
      "stage": "final",
      "task": "instruction_induction",
      "noise_kind": "own",
      "noise_level": 0.0,
      "arm": method,
      "seed": 100 + index,
      "learning_rate": 7e-3,
      "validation_nats": nats - 0.5 + change,
      "test_nats": nats + change,
      "test_accuracy": 0.5 + 0.01 * index,
      "routing/support_start": 5.03 if method == ROUTED else np.nan,
      "router/effective_support": 5.02 if method == ROUTED else np.nan,
      **{column: gain[index] if method == ROUTED else np.nan for column in routing_gain.GAINS},
    }
    for method in (LORA, ROUTED)
    for index, nats in enumerate(NATS)
    for change in ((difference[index] if method == ROUTED else 0.0),)
  ]
  search = [
    {
      "stage": "search",
      "arm": method,
      "seed": 0,
      "learning_rate": rate,
      "validation_nats": nats + (0.03 if method == ROUTED else 0.0),
      "routing/gain_uniform": by_rate,
      "routing/moved_weights": 0.5,
      "routing/moved_atoms": 0.04,
    }
    for method in (LORA, ROUTED)
    for (rate, nats), by_rate in zip(((1e-3, 1.1), (3e-2, 6.0)), gains_by_rate, strict=True)
  ]
  return pd.DataFrame([*final, *search])


@pytest.fixture
def commit(tmp_path, monkeypatch):
  """Commits runs as `deciding`, and the same without routing columns as `induction`."""

  def made(table):
    routed = [name for name in table if name.startswith(("routing/", "router/"))]
    plain = table.assign(**dict.fromkeys(routed, np.nan), learning_rate=3e-3)
    found = {}
    for name, rows in (("deciding", table), ("induction", plain)):
      found[name] = committed.Results(tmp_path / name)
      found[name].folder.mkdir()
      (found[name].folder / "results.parquet").touch()
      found[name].study = types.SimpleNamespace(
        stage=lambda stage, rows=rows: rows[rows["stage"] == stage]
      )
    monkeypatch.setattr(committed, "results", found.__getitem__)
    return found["deciding"]

  return made


LOWER, TIE = (-0.10, -0.11, -0.09), (-0.10, 0.11, 0.01)
IN_USE, SOME, INERT = (0.05, 0.06, 0.05), (0.05, -0.02, 0.01), (0.001, -0.001, 0.0)


@pytest.mark.parametrize(
  "difference, gain, verdict, by_routing",
  [
    (LOWER, IN_USE, "supported", "supported"),
    (LOWER, SOME, "supported", routing_gain.INERT),  # a mean above zero, the interval not
    (LOWER, INERT, "supported", routing_gain.INERT),
    (TIE, IN_USE, "no significant difference", "no significant difference"),
    (TIE, INERT, "no significant difference", routing_gain.INERT),
    (tuple(-each for each in LOWER), IN_USE, "not supported", "not supported"),
  ],
)
def test_the_rule_of_the_claims(commit, difference, gain, verdict, by_routing):
  results = commit(runs(difference, gain))
  lower, routed = deciding.claims(results)
  assert (lower.cells()[1], routed.cells()[1]) == (verdict, by_routing)
  expected = (
    np.mean(difference),
    *stats.t.interval(0.95, 2, np.mean(difference), stats.sem(difference)),
  )
  written = re.findall(r"[+−][0-9.]+", lower.cells()[2])[:3]
  ends = [float(text.replace("−", "-")) for text in written]
  np.testing.assert_allclose(ends, expected, rtol=0.05)  # two digits


def test_the_tables_have_the_numbers_of_both_studies(commit):
  results = commit(runs(TIE, SOME))
  rows = [
    [cell.strip() for cell in line.strip("| ").split("|")]
    for line in deciding.final_table(results).splitlines()
  ]
  header, _, *body = rows
  assert [row[2] for row in body] == ["0.007", "0.007", "0.003", "0.003"]
  low, high = stats.t.interval(0.95, 2, np.mean(SOME), stats.sem(SOME))
  gains = f"{np.mean(SOME):+.4f} [{low:+.4f}, {high:+.4f}]".replace("-", "−")
  routed = dict(zip(header, body[1], strict=True))
  for words in routing_gain.GAINS.values():
    assert routed[f"rise of nats with {words}"] == gains
  assert routed["effective support as drawn, all tokens"] == "5.03"
  assert routed["as trained, answer tokens"] == "5.02"
  scores = np.add(NATS, TIE)
  low, high = stats.t.interval(0.95, 2, np.mean(scores), stats.sem(scores))
  assert routed["test nats, new wordings"] == f"{np.mean(scores):.3f} [{low:.3f}, {high:.3f}]"
  for row in (body[0], body[2], body[3]):  # LoRA, and what was trained before there was a gain
    assert set(row[6:]) == {"–"}


def test_the_search_has_both_methods_at_each_rate(commit):
  results = commit(runs(TIE, SOME, gains_by_rate=(-0.0004, 0.2)))
  *_, small, large = deciding.search_table(results).splitlines()
  assert small == "| 0.001 | 1.100 | 1.130 | +0.030 | −0.0004 | 0.50 | 0.04 |"
  assert large == "| 0.03 | 6.000 | 6.030 | +0.030 | +0.2000 | 0.50 | 0.04 |"


def test_without_the_study_there_is_no_claim(tmp_path):
  absent = committed.Results(tmp_path / deciding.STUDY)
  assert deciding.claims(absent) == [] and deciding.tables_of(absent) == {}
