"""The factorial on a language model: cells, contrasts, and that what is committed follows."""

import numpy as np
import pandas as pd
import pytest
import study_of

from configs import factorial_language as config
from experiments import committed
from experiments.analysis import factorial as analysis
from qlora_jax import sweeps
from qlora_jax.studies import protocol
from qlora_jax.studies import study as study_lib

DOMAIN = analysis.DOMAINS["language"]
SEEDS = (100, 101, 102)


def test_cells_have_one_size_and_read_what_they_say():
  points = config.get_hyper(sweeps)
  runs = protocol.planned(config.get_config(), points)
  np.testing.assert_allclose(runs["trainable_params"], 2_450_000, rtol=0.02)
  assert set(runs["arm"]) == {"/".join(cell) for cell in config.CELLS}
  for own, rates in study_lib.expand(config.get_config(), points):
    instruction, routing, truth = own.label.split("/")
    adapter = study_lib.resolve(own, abstract=True).model.adapter
    assert len(rates) == 3
    assert adapter.uses_instruction == (instruction not in ("none", "input"))
    assert own.instruction.in_prompt == (instruction == "input")
    assert own.instruction.exchanged == (truth == "shuffled")
    by_token = adapter.family == "queryable" and adapter.routing != "static" and adapter.query_state
    assert by_token == (routing in ("on", "uniform"))


def rows(nats):
  """Rows of a made-up study; `nats(instruction, routing, truth)` are those of a seed 1."""
  found, rng = [], np.random.default_rng(0)
  noise = np.exp(0.05 * rng.normal(size=len(SEEDS)))
  for instruction, routing, truth in config.CELLS:
    for stage, seeds in (("search", (0,)), ("final", SEEDS)):
      for place, seed in enumerate(seeds):
        value = nats(instruction, routing, truth) * noise[place]
        found.append(
          {
            "stage": stage,
            "task": "instruction_induction",
            "seed": seed,
            "learning_rate": 0.003,
            "arm": f"{instruction}/{routing}/{truth}",
            "rank": 8,
            "atoms": 16,
            "trainable_params": 2_444_768,
            "router/effective_support": 2.0,
            "test_nats": value,
            "test_seen_nats": value,
            "test_accuracy": 0.5,
          }
        )
  return pd.DataFrame(found)


def test_three_seeds_have_students_intervals_and_examples_their_contrast():
  def nats(instruction, routing, truth):
    if truth == "shuffled" or instruction in ("none", "kl"):
      return 1.2
    return {"on": 0.6, "example": 0.8}.get(routing, 0.9)

  made = rows(nats)
  found = analysis.effects(made, DOMAIN)
  own = found[found["truth"] == "unseen"].set_index("effect")
  assert own.loc["(prior − none) × (on − static)", "percent"] == pytest.approx(100 * (6 / 9 - 1))
  assert own.loc["on − example, query", "percent"] == pytest.approx(-25)
  # Student's: differences of -0.6 times the seeds' noise, on the scale of nats.
  values = -0.2 * made[(made["arm"] == "none/on/absent") & (made["stage"] == "final")]["test_nats"]
  values = values / 1.2
  half = 4.302653 * values.std() / np.sqrt(3)
  row = own.loc["on − example, query"]
  assert (row["error_low"], row["error_high"]) == pytest.approx(
    (values.mean() - half, values.mean() + half), rel=1e-4
  )
  cells = analysis.cells(made, DOMAIN).set_index(["instruction", "routing", "truth"])
  assert cells.loc[("prior", "on", "unseen"), "exact_match"] == 50
  assert np.isnan(cells.loc[("prior", "on", "true"), "exact_match"])


def test_what_is_committed_follows_from_the_committed_runs(tmp_path, capsys):
  study_of.check_derived_files(
    "factorial_language", tmp_path, ["cells.csv", "effects.csv", "summary.md"]
  )
  assert "interaction" in capsys.readouterr().out


def test_committed_cells_had_three_rates_and_three_seeds():
  found = committed.results("factorial_language").rows
  final = set(found.loc[found["stage"] == "final", "arm"])
  assert {"prior/on/true", "prior/static/true", "none/on/absent", "none/static/absent"} <= final
  for method in final:
    own = found[found["arm"] == method]
    assert own.loc[own["stage"] == "search", "learning_rate"].nunique() == 3, method
    assert own.loc[own["stage"] == "final", "seed"].nunique() == 3, method


def test_the_findings_quote_the_committed_summary():
  _, page = study_of.page_of("factorial").split("## On a language model")
  study_of.check_quotes(page, "factorial_language")
