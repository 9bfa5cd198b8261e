"""The deciding pair on a language model at seven learning rates, with what the routing gains.

LoRA and Queryable LoRA with the prior, both with the instruction in the prompt. The rule of its
claims is in `configs/llm.py`, written before the runs.
"""

import numpy as np
import pandas as pd

from experiments.questions import committed, question, routing
from experiments.report import style, tables
from qlora_jax.studies import statistics

STUDY = "deciding"
ROUTED, BASELINE = "queryable_prior+prompt", "lora+prompt"
WHERE = f"{STUDY} instruction_induction {ROUTED}"
# Column of the results -> heading, factor and digits.
_SCORES = {
  "validation_nats": ("validation nats", 1, 3),
  "test_nats": ("test nats, new wordings", 1, 3),
  "test_accuracy": ("exact match, new wordings, %", 100, 1),
}
_TIE = 0.01  # nats: the least gain at which a tie is one between routing and no routing


def ready() -> bool:
  """Whether the study is committed."""
  return (committed.RESULTS / STUDY).is_dir()


def answer() -> list[question.Claim]:
  """Whether Queryable LoRA lowers the nats of a prompted model, and whether by its routing."""
  if not ready():
    return []
  change = difference("test_nats")
  verdict = "supported" if change.high < 0 else "not supported" if change.low > 0 else ""
  gain = routing.gains(WHERE).set_index("column").loc["routing/gain_uniform", "mean"]
  by_routing = verdict or ("no significant difference" if gain >= _TIE else routing.INERT)
  ends = tables.with_interval(*change, lambda value: tables.signed(value, 2))
  evidence = f"{ends} nats per test answer token, seven rates, 3 seeds (Student)"
  return [
    question.Claim(
      "lower nats than LoRA where both have the prompt",
      verdict or "no significant difference",
      evidence,
    ),
    question.Claim("the routing lowers the nats there", by_routing, evidence, routing=WHERE),
  ]


def difference(column: str) -> statistics.Interval:
  """Queryable LoRA less LoRA over the final seeds, paired."""
  final = committed.study(STUDY).stage("final")
  scores = final.pivot(index="seed", columns="method", values=column)
  return statistics.paired_interval(scores[ROUTED], scores[BASELINE])


def final_table() -> str:
  """The pair at seven rates beside the pair at four of them that was trained before."""
  rows = []
  for study, when in ((STUDY, "seven rates"), ("induction", "four rates, earlier")):
    final = committed.study(study).stage("final")
    for method in (BASELINE, ROUTED):
      own = final[final["method"] == method]
      cells = [style.method(method).label, when, f"{own['learning_rate'].iloc[0]:g}"]
      for column, (_, factor, digits) in _SCORES.items():
        known = column in own and own[column].notna().all()
        ends = statistics.mean_interval(factor * own[column]) if known else None
        cells.append(_written(ends, f"{{:.{digits}f}}") if ends else tables.MISSING)
      # A study that has not measured the gain has the columns empty.
      routed = method == ROUTED and own["routing/support_start"].notna().all()
      for column in ("routing/support_start", "router/effective_support"):
        measured = method == ROUTED and own[column].notna().all()
        cells.append(f"{own[column].mean():.2f}" if measured else tables.MISSING)
      cells += [
        _written(statistics.mean_interval(own[column]), "{:+.4f}") if routed else tables.MISSING
        for column in routing.GAINS
      ]
      rows.append(cells)
  header = [
    "method",
    "search",
    "rate",
    *(heading for heading, *_ in _SCORES.values()),
    "effective support as drawn, all tokens",
    "as trained, answer tokens",
    *(f"rise of nats with {words}" for words in routing.GAINS.values()),
  ]
  return committed.markdown(header, rows)


def search_table() -> str:
  """The search of both methods, and what the routing gains at each rate; one seed."""
  search = committed.study(STUDY).stage("search")
  nats = search.pivot(index="learning_rate", columns="method", values="validation_nats")
  routed = search[search["method"] == ROUTED].set_index("learning_rate")
  rows = [
    [
      f"{rate:g}",
      f"{row[BASELINE]:.3f}",
      f"{row[ROUTED]:.3f}",
      f"{row[ROUTED] - row[BASELINE]:+.3f}".replace("-", "−"),
      f"{routed.loc[rate, 'routing/gain_uniform']:+.4f}".replace("-", "−"),
      f"{routed.loc[rate, 'routing/moved_weights']:.2f}",
      f"{routed.loc[rate, 'routing/moved_atoms']:.2f}",
    ]
    for rate, row in nats.iterrows()
  ]
  labels = [style.method(method).label for method in (BASELINE, ROUTED)]
  header = [
    "rate",
    *(f"{label}, validation nats" for label in labels),
    "difference",
    "rise with equal weights",
    "weights moved",
    "atoms moved",
  ]
  return committed.markdown(header, rows)


def curve() -> pd.DataFrame:
  """Mean gain over equal weights by step of the final runs: columns `step`, `mean`, and the ends
  of the range over seeds."""
  study = committed.study(STUDY)
  final = study.stage("final")
  routed = final[final["method"] == ROUTED]["run_id"]
  column = "routing/gain_uniform"
  rows = study.curves[study.curves["run_id"].isin(routed)].dropna(subset=[column])
  steps = rows.groupby("step")[column]
  return pd.DataFrame({"mean": steps.mean(), "low": steps.min(), "high": steps.max()}).reset_index()


def _written(ends, template: str) -> str:
  mean, low, high = (template.format(end) for end in np.asarray(ends))
  return f"{mean} [{low}, {high}]".replace("-", "−")


TABLES = {"language_seven_rates": final_table, "language_seven_rates_search": search_table}
