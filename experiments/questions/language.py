"""What does the instruction prior give a language model, with the prompt and without it?"""

import functools
import pathlib

import pandas as pd

from experiments.questions import committed, deciding, question, routing
from experiments.report import plot_accuracy, style, tables
from qlora_jax.studies import statistics

# Column -> heading and digits.
_SCORES = {
  "test_nats": ("nats per answer token, new wordings", 3),
  "test_seen_nats": ("known wordings", 3),
  "test_accuracy": ("exact match, new wordings, %", 1),
}
_COMBINED = {
  "validation_nats": ("validation nats", 3),
  "test_accuracy": ("exact match, new wordings, %", 1),
  "test_seen_accuracy": ("known wordings, %", 1),
}
PAIRS = {"all_tasks": "24 tasks of instruction-induction", "gsm8k": "GSM8K"}  # studies of two
_PAIR = ("queryable_prior+prompt", "lora+prompt")
_SHUFFLED = "queryable_prior+shuffled"


def answer() -> list[question.Claim]:
  """Claims about the prior, judged by exact match in wordings that training has not seen."""
  rows = committed.summary("induction")
  with_prompt = rows[(rows["method"] == _PAIR[0]) & (rows["baseline"] == _PAIR[1])].iloc[0]
  ends = [with_prompt[f"difference{end}"] for end in ("", "_low", "_high")]
  own = rows.drop_duplicates("method").set_index("method")["test_accuracy"]
  verdicts = {"better": "supported", "worse": "not supported"}
  carried, replaced, shuffled = (
    _points("queryable_prior", other) for other in ("queryable", "lora+prompt", _SHUFFLED)
  )
  return [
    question.Claim(
      "the prior adds to a prompt that the model reads",
      verdicts.get(with_prompt["verdict"], "no difference seen"),
      f"{tables.with_interval(*ends, tables.percent)} points to LoRA with the prompt, paired over"
      f" {with_prompt['num_pairs']:.0f} seeds",
      f"induction {_PAIR[0]}",
    ),
    question.Claim(
      "the prior carries an instruction that the prompt does not hold",
      "supported"
      if min(carried.low, shuffled.low) > 0
      else "not supported"
      if carried.high < 0
      else "inconclusive",
      f"exact match {own['queryable_prior']:.1f} % with the prior, {own['queryable']:.1f} % without"
      f" it ({_told(carried)} points), {own[_SHUFFLED]:.1f} % with shuffled wordings"
      f" ({_told(shuffled)})",
    ),
    question.Claim(
      "the prior replaces the prompt",
      "not supported" if replaced.high < 0 else "supported" if replaced.low > 0 else "inconclusive",
      f"{own['queryable_prior']:.1f} % against {own['lora+prompt']:.1f} % of LoRA with the prompt:"
      f" {_told(replaced)} points",
    ),
    *deciding.answer(),
    *_likelihoods(),
  ]


def _points(ours: str, theirs: str) -> statistics.Interval:
  """The paired difference of two ways in points of exact match in new wordings."""
  final = committed.study("induction").stage("final")
  scores = final.pivot(index="seed", columns="method", values="test_accuracy")
  both = 100 * scores[[ours, theirs]].dropna()
  return statistics.paired_interval(both[ours], both[theirs])


def _told(ends: statistics.Interval) -> str:
  return tables.with_interval(*ends, tables.percent)


def _likelihoods() -> list[question.Claim]:
  """Whether the routed method has fewer nats of test answers, in each study of two."""
  found = []
  for study, told in PAIRS.items():
    if not (committed.RESULTS / study).is_dir():
      continue
    row = pair(study).iloc[-1]
    low, high = row["test_nats_low"], row["test_nats_high"]
    verdict = "supported" if high < 0 else "not supported" if low > 0 else "no difference seen"
    ends = tables.with_interval(
      row["test_nats_difference"], low, high, lambda x: tables.signed(x, 2)
    )
    found.append(
      question.Claim(
        f"{row['label']} has a better likelihood than LoRA on {told}",
        verdict,
        f"{ends} nats per answer token, {row['seeds']:.0f} seeds (Student)",
        f"{study} {row['method']}",
      )
    )
  return found


def pair(study: str) -> pd.DataFrame:
  """The base, LoRA and the routed method of a study of two, with Student's paired differences.

  Columns: `method`, `label`, `trainable_params`, `learning_rate`, `seeds`, and for each of
  `test_nats`, `test_seen_nats` and `test_accuracy` the mean, and of the routed one `_difference`,
  `_low`, `_high` and `_p`.
  """
  final = committed.study(study).stage("final")
  scores = [name for name in _SCORES if name in final]
  methods = sorted(final["method"].unique(), key=lambda name: not name.startswith("lora"))
  tables_of = {name: final.pivot(index="seed", columns="method", values=name) for name in scores}
  rows = [
    {
      "label": "Frozen base + prompt",
      "trainable_params": 0,
      **{name: _unit(name) * final[f"base_{name}"].mean() for name in scores},
    }
  ]
  for method in methods:
    own = final[final["method"] == method]
    row = {
      "method": method,
      "label": style.method(method).label,
      "seeds": len(own),
      **own[["trainable_params", "learning_rate"]].iloc[0],
    }
    for name in scores:
      row[name] = _unit(name) * own[name].mean()
      if method != methods[0]:
        differences = _unit(name) * (tables_of[name][method] - tables_of[name][methods[0]])
        interval, p_value = statistics.student(differences)
        row |= {
          f"{name}_difference": interval.mean,
          f"{name}_low": interval.low,
          f"{name}_high": interval.high,
          f"{name}_p": p_value,
        }
    rows.append(row)
  return pd.DataFrame(rows)


def _unit(score: str) -> float:
  return 100.0 if score.endswith("accuracy") else 1.0


def pair_table(study: str) -> str:
  """`pair` in Markdown."""
  rows = []
  for row in pair(study).to_dict("records"):
    rate = f"{row['learning_rate']:g}" if pd.notna(row["learning_rate"]) else "–"
    cells = [row["label"], f"{row['trainable_params']:,.0f}", rate]
    for name, (_, digits) in _SCORES.items():
      text = f"{row[name]:.{digits}f}"
      if pd.notna(row.get(f"{name}_difference")):
        ends = (f"{row[f'{name}_{end}']:+.{digits}f}" for end in ("difference", "low", "high"))
        mean, low, high = ends
        text += f" ({mean} [{low}, {high}])".replace("-", "−")
      cells.append(text)
    rows.append(cells)
  header = ["method", "trainable", "rate", *(heading for heading, _ in _SCORES.values())]
  return committed.markdown(header, rows)


def combined_table() -> str:
  """Three changes of `reasons` at once, beside the deciding pair; differences to its LoRA."""
  pair_of, own = (committed.study(name).stage("final") for name in ("induction", "combined"))
  final = pd.concat([pair_of[pair_of["method"].isin(_PAIR)], own], ignore_index=True)
  tables_of = {name: final.pivot(index="seed", columns="method", values=name) for name in _COMBINED}
  rows = []
  for method in (_PAIR[1], _PAIR[0], *own["method"].unique()):
    first = final[final["method"] == method].iloc[0]
    cells = [
      "the three changes" if method in set(own["method"]) else style.method(method).label,
      f"{first['trainable_params']:,.0f}",
      f"{first['learning_rate']:g}",
    ]
    for name, (_, digits) in _COMBINED.items():
      values = _unit(name) * tables_of[name]
      text = f"{values[method].mean():.{digits}f}"
      if method != _PAIR[1]:
        ends = statistics.paired_interval(values[method], values[_PAIR[1]])
        mean, low, high = (f"{end:+.{digits}f}" for end in ends)
        text += f" ({mean} [{low}, {high}])".replace("-", "−")
      cells.append(text)
    rows.append(cells)
  header = ["method", "trainable", "rate", *(heading for heading, _ in _COMBINED.values())]
  return committed.markdown(header, rows)


def swap_table() -> str:
  """The swap test of one run: validation nats with its weights as trained and replaced."""
  row = routing.swap()
  cells = [
    style.method(row["method"]).label,
    f"{row['seed']:.0f}",
    f"{row['steps']:.0f}",
    *(f"{row[name]:.4f}" for name in ("nats", "nats_uniform", "nats_permuted")),
    f"{row['support_start']:.2f}",
    f"{row['support_end']:.2f}",
  ]
  header = [
    "method",
    "seed",
    "steps",
    "nats as trained",
    "equal weights",
    "atoms permuted",
    "effective support at the start",
    "at the end",
  ]
  return committed.markdown(header, [cells])


def table() -> str:
  """Every method's exact match and likelihood."""
  from experiments import documents  # which lists the questions' tables, too

  return documents.language_deciding()


def draw(target: pathlib.Path) -> None:
  """Writes `target`.svg and .png."""
  with style.context():
    made = plot_accuracy.splits(committed.study("induction"), committed.summary("induction"))
    made.figure.savefig(target.with_suffix(".png"), dpi=200)
    made.figure.savefig(target.with_suffix(".svg"))


QUESTION = question.Question(
  name="language_accuracy",
  caption="Exact match of greedily generated answers in percent on 100 held-out inputs of each of"
  " six tasks of instruction-induction, SmolLM2-135M-Instruct after 50 steps, with new and with"
  " known wordings of the instruction. Bars are Student's 95 % intervals over three seeds; the"
  " broken lines are the model before training.",
  study="induction",
  command="python launch.py --config=configs/llm.py:induction --workdir=runs/induction --sweep",
  draw=draw,
  tables={
    "language_deciding": table,
    "language_combined": combined_table,
    **(deciding.TABLES if deciding.ready() else {}),
    "language_swap": swap_table,
    **{f"language_{study}": functools.partial(pair_table, study) for study in PAIRS},
  },
  answer=answer,
)
