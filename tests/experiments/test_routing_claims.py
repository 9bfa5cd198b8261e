"""Claims about routing: the gain of an arm by hand, and the sentences that it allows."""

import types

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments import committed, routing_gain, routing_sentences, study
from qlora_jax.workloads import routing_gain as evaluation

WHERE = "made friedman1 queryable"


def rows(**gains):
  """Final runs of ten seeds; `gains` has the mean of each column, without its prefix."""
  noise = np.random.default_rng(0).normal(size=10)
  table = pd.DataFrame(
    {
      "stage": "final",
      "task": "friedman1",
      "noise_kind": "gaussian",
      "noise_level": 0.5,
      "arm": "queryable",
      "seed": range(100, 110),
    }
  )
  for name, mean in gains.items():
    table[f"routing/{name}"] = mean + 0.01 * noise
  return table


@pytest.fixture
def commit(tmp_path, monkeypatch):
  """Commits a table of rows as the study `made`."""

  def of(table, name="made"):
    results = committed.Results(tmp_path / name)
    results.folder.mkdir(exist_ok=True)
    (results.folder / "results.parquet").touch()
    stages = types.SimpleNamespace(stage=lambda stage: table[table["stage"] == stage])
    results.study = stages
    other = committed.Results(tmp_path / "nowhere")
    monkeypatch.setattr(committed, "results", lambda of: results if of == name else other)

  return of


ALL = {"gain_uniform": 0.1, "gain_mean": 0.1, "gain_other": 0.2}


@pytest.mark.parametrize(
  "gains, verdict",
  [
    ({}, routing_gain.NOT_MEASURED),
    (ALL, "supported"),
    (ALL | {"gain_uniform": 0.0}, routing_gain.INERT),
    (ALL | {"gain_uniform": -0.1, "gain_mean": -0.1}, routing_gain.INERT),
    (ALL | {"gain_mean": 0.0}, routing_gain.ALIKE),
    (ALL | {"gain_other": -0.2}, "supported"),  # the rules do not ask for it
    ({"gain_uniform": 0.1}, routing_gain.ALIKE),  # the other two are missing
    ({"gain_mean": 0.1}, routing_gain.INERT),
  ],
)
def test_a_verdict_on_routing_needs_its_gains_above_zero(commit, gains, verdict):
  commit(rows(**gains))
  assert routing_gain.verdict(WHERE, "supported") == verdict
  claim = study.Claim("routing lowers the error", "supported", "−9 %", WHERE)
  assert claim.cells()[1] == verdict
  assert ("<!-- routing:" in claim.cells()[0]) == (verdict == "supported")
  assert study.Claim("the error is lower", "supported", "−9 %").cells()[1] == "supported"


def test_the_deciding_study_needs_the_gain_over_equal_weights_alone(commit):
  commit(rows(**(ALL | {"gain_mean": -0.1})), "deciding")
  assert routing_gain.allowed("deciding friedman1 queryable")
  commit(rows(**(ALL | {"gain_uniform": -0.1})), "deciding")
  assert not routing_gain.allowed("deciding friedman1 queryable")


def test_one_seed_has_no_interval_and_allows_nothing(commit):
  commit(rows(**ALL).head(1))
  assert routing_gain.verdict(WHERE, "supported") == routing_gain.INERT


def test_every_setting_of_the_task_needs_its_gain(commit):
  quiet, loud = rows(**ALL), rows(**(ALL | {"gain_uniform": -0.1}))
  commit(pd.concat([quiet.assign(noise_level=0.0), loud]))
  assert routing_gain.verdict(WHERE, "supported") == routing_gain.INERT
  commit(pd.concat([quiet.assign(noise_level=0.0), quiet]))
  assert routing_gain.allowed(WHERE)


def test_frozen_networks_are_the_sample_where_there_are_several(commit):
  means = (0.1, 0.2, 0.6)
  parts = [rows(**ALL).assign(arm=f"queryable/{n}") for n, _ in enumerate(means)]
  for part, mean in zip(parts, means, strict=True):
    part["routing/gain_uniform"] = mean
  commit(pd.concat(parts))
  row = routing_gain.gains(WHERE).set_index("column").loc["routing/gain_uniform"]
  low, high = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
  assert (row["mean"], row["low"], row["high"]) == pytest.approx((0.3, low, high))
  assert low < 0 and routing_gain.verdict(WHERE, "supported") == routing_gain.INERT


@pytest.mark.parametrize("where", ["nowhere queryable", "made lora", "made sines queryable"])
def test_an_arm_that_does_not_exist_is_an_error(commit, where):
  commit(rows(**ALL))
  with pytest.raises(ValueError, match="routing"):
    routing_gain.gains(where)


def test_the_columns_are_those_that_training_writes():
  assert set(routing_gain.GAINS) == set(evaluation.GAINS)


def test_every_claim_of_the_committed_studies_names_an_arm_that_exists():
  records = [record for record in study.registry().values() if record.committed_results.exists]
  claims = [claim for record in records for claim in record.claims(record.committed_results)]
  about = [claim for claim in claims if claim.routing]
  assert len(about) >= 10
  for claim in about:
    routing_gain.gains(claim.routing)  # raises where the arm is unknown
  verdicts = {claim.cells()[1] for claim in about if "language" in claim.routing}
  assert verdicts <= {routing_gain.NOT_MEASURED, routing_gain.INERT}


@pytest.mark.parametrize(
  "text", [pytest.param(text, id=name) for name, text in routing_sentences.texts()]
)
def test_every_sentence_on_routing_has_its_gain_or_says_that_there_is_none(text):
  assert not routing_sentences.unsupported(text)


PLANTED = [
  "The routing lowers the error on friedman1.",
  "It is a good day. The routing lowers the error on friedman1.",
  "The routing, like Lily's, lowers the error, which is not significant on sines.",
  "The error does not depend on the noise, and routing helps.",
  "- **Routing helps** on friedman1.",
  "| does the router help | yes | −9 % |",
  "| factorial | routing lowers the error | supported | −9 % |",
  "The router is trained. It lowers the error.",
  "With routing −9.1 % [−12.0, −6.2] on friedman1.",
  "Routing not only helps on friedman1.",
  "Rerouting halves the error.",
  "Routing is essential on regimes.",
  "Routing accounts for most of the accuracy.",
  "Routing solves regimes.",
  "# Why routing pays",
  "What the routing gains is large: it lowers the error.",
  "The routing lowers the error. <!-- routing: no claim -->",
  "Routing helps: [0.1, 0.2]. <!-- routing: no claim -->",
  "The routing lowers the error. <!-- routing: nowhere queryable -->",
  "The routing lowers the nats. <!-- routing: induction queryable_prior+prompt -->",
  "The routing lowers the error. <!-- routing: regression regimes queryable -->",
  "The routing is inert. <!-- routing: regression regimes queryable --> The router adds to it.",
  "<!-- table: claims -->\n| x | routing helps | supported | −9 % |\n<!-- end -->",
]
SOUND = [
  "The routing adds nothing on friedman1.",
  "The routing is inert.",
  "What the routing gains during training",
  "Routing is softmax attention over atoms.",
  "Does routing lower the error?",
  "The error is lower on friedman1.",
  "| x | routing lowers the error | not tested (inert routing) | −9 % [−12.0, −6.2] |",
  "The routed step takes less time. <!-- routing: no claim -->",
  "`python -m routing --help` and [why it helps](routing.md).",
  "<!-- table: factorial -->\n| with routing on | −9.1 % [−12.0, −6.2] |\n<!-- end -->",
]


@pytest.mark.parametrize("text", PLANTED)
def test_a_planted_claim_is_found(text):
  assert routing_sentences.unsupported(text)


@pytest.mark.parametrize("text", SOUND)
def test_other_sentences_pass(text):
  assert not routing_sentences.unsupported(text)


def test_a_page_with_a_planted_sentence_fails():
  text = (committed.ROOT / "docs" / "results.md").read_text()
  planted = text.replace(
    "## Scaling\n", "The routing lowers the error on friedman1.\n\n## Scaling\n"
  )
  assert planted != text and len(routing_sentences.unsupported(planted)) == 1


def test_a_marker_allows_a_sentence_only_while_the_gain_is_above_zero(commit):
  text = f"The routing lowers the error on friedman1. <!-- routing: {WHERE} --> More."
  commit(rows(**ALL))
  assert not routing_sentences.unsupported(text)
  commit(rows(**(ALL | {"gain_uniform": 0.0})))
  assert len(routing_sentences.unsupported(text)) == 1
