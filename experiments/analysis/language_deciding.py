"""The deciding pair on a language model at seven learning rates, with the routing gain.

LoRA and Queryable LoRA with the prior, both with the instruction in the prompt. The rule of the
claims is in `configs/llm.py`, written before the runs.
"""

import numpy as np

from experiments import committed, comparisons, routing_gain
from experiments import study as study_lib
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


def claims(results: committed.Results) -> list[study_lib.Claim]:
  """Whether Queryable LoRA lowers the nats of a prompted model, and whether by its routing.

  Empty while the study is not committed.
  """
  if not results.of(STUDY).exists:
    return []
  change = difference(results, "test_nats")
  verdict = "supported" if change.high < 0 else "not supported" if change.low > 0 else ""
  gain = routing_gain.gains(WHERE, results).set_index("column").loc["routing/gain_uniform", "mean"]
  by_routing = verdict or ("no significant difference" if gain >= _TIE else routing_gain.INERT)
  ends = tables.with_interval(*change, lambda value: tables.signed(value, 2))
  evidence = f"{ends} nats per test answer token, seven rates, 3 seeds (Student)"
  return [
    study_lib.Claim(
      "lower nats than LoRA where both have the prompt",
      verdict or "no significant difference",
      evidence,
    ),
    study_lib.Claim("the routing lowers the nats there", by_routing, evidence, routing=WHERE),
  ]


def difference(results: committed.Results, column: str) -> statistics.Interval:
  """Queryable LoRA less LoRA over the final seeds, paired."""
  final = results.of(STUDY).study.stage("final")
  scores = final.pivot(index="seed", columns="arm", values=column)
  return statistics.paired_interval(scores[ROUTED], scores[BASELINE])


def final_table(results: committed.Results) -> str:
  """The pair at seven rates beside the pair at four of them that was trained before."""
  rows = []
  for study, when in ((STUDY, "seven rates"), ("induction", "four rates, earlier")):
    final = results.of(study).study.stage("final")
    for method in (BASELINE, ROUTED):
      rows_of_method = final[final["arm"] == method]
      cells = [style.method(method).label, when, f"{rows_of_method['learning_rate'].iloc[0]:g}"]
      for column, (_, factor, digits) in _SCORES.items():
        known = column in rows_of_method and rows_of_method[column].notna().all()
        ends = statistics.mean_interval(factor * rows_of_method[column]) if known else None
        cells.append(_written(ends, f"{{:.{digits}f}}") if ends else tables.MISSING)
      # A study that has not measured the gain has the columns empty.
      routed = method == ROUTED and rows_of_method["routing/support_start"].notna().all()
      for column in ("routing/support_start", "router/effective_support"):
        measured = method == ROUTED and rows_of_method[column].notna().all()
        cells.append(f"{rows_of_method[column].mean():.2f}" if measured else tables.MISSING)
      cells += [
        _written(statistics.mean_interval(rows_of_method[column]), "{:+.4f}")
        if routed
        else tables.MISSING
        for column in routing_gain.GAINS
      ]
      rows.append(cells)
  header = [
    "method",
    "search",
    "rate",
    *(heading for heading, *_ in _SCORES.values()),
    "effective support as drawn, all tokens",
    "as trained, answer tokens",
    *(f"rise of nats with {words}" for words in routing_gain.GAINS.values()),
  ]
  return comparisons.markdown(header, rows)


def search_table(results: committed.Results) -> str:
  """The search of both methods, and the routing gain at each rate; one seed."""
  search = results.of(STUDY).study.stage("search")
  nats = search.pivot(index="learning_rate", columns="arm", values="validation_nats")
  routed = search[search["arm"] == ROUTED].set_index("learning_rate")
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
  return comparisons.markdown(header, rows)


def _written(ends, template: str) -> str:
  mean, low, high = (template.format(end) for end in np.asarray(ends))
  return f"{mean} [{low}, {high}]".replace("-", "−")


def tables_of(results: committed.Results) -> dict[str, study_lib.Table]:
  """The tables that documents may show; empty while the study is not committed."""
  if not results.of(STUDY).exists:
    return {}
  return {"language_seven_rates": final_table, "language_seven_rates_search": search_table}
