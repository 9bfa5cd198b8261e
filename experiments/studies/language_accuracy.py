"""What does the instruction prior give a language model, with the prompt and without it?

SmolLM2-135M-Instruct on instruction-induction and GSM8K: `docs/language_results.md`. The main runs
are in `induction`; the runs of `combined`, `reasons`, `all_tasks`, `gsm8k` and `deciding` are other
variants of the same config.

  python launch.py --config=configs/llm.py:induction --workdir=runs/induction --sweep
  python -m experiments language_accuracy --from=runs/induction
  python -m experiments keep --from=runs/gsm8k --results=experiments/results/gsm8k
"""

import functools

from matplotlib import figure

from experiments import committed
from experiments import study as study_lib
from experiments.analysis import language_deciding, language_tables
from experiments.report import plot_accuracy, tables
from qlora_jax.studies import statistics

PAIRS = {"all_tasks": "24 tasks of instruction-induction", "gsm8k": "GSM8K"}  # studies of two
_SHUFFLED = "queryable_prior+shuffled"


def claims(results: committed.Results) -> list[study_lib.Claim]:
  """Claims about the prior, judged by exact match in wordings that training has not seen.

  Rule: supported where Student's 95 % interval of the paired difference lies above zero, not
  supported where it lies below. `configs/llm.py` has the rule of the claims on likelihood.
  """
  rows = results.summary
  with_prompt = rows[
    (rows["arm"] == language_tables.PAIR[0]) & (rows["baseline"] == language_tables.PAIR[1])
  ].iloc[0]
  ends = [with_prompt[f"difference{end}"] for end in ("", "_low", "_high")]
  accuracy = rows.drop_duplicates("arm").set_index("arm")["test_accuracy"]
  verdicts = {"better": "supported", "worse": "not supported"}
  carried, replaced, shuffled = (
    _points(results, "queryable_prior", other) for other in ("queryable", "lora+prompt", _SHUFFLED)
  )
  return [
    study_lib.Claim(
      "the prior adds to a prompt that the model reads",
      verdicts.get(with_prompt["verdict"], "no difference seen"),
      f"{tables.with_interval(*ends, tables.percent)} points to LoRA with the prompt, paired over"
      f" {with_prompt['num_pairs']:.0f} seeds",
      f"induction {language_tables.PAIR[0]}",
    ),
    study_lib.Claim(
      "the prior carries an instruction that the prompt does not hold",
      "supported"
      if min(carried.low, shuffled.low) > 0
      else "not supported"
      if carried.high < 0
      else "inconclusive",
      f"exact match {accuracy['queryable_prior']:.1f} % with the prior,"
      f" {accuracy['queryable']:.1f} % without it ({_in_points(carried)} points),"
      f" {accuracy[_SHUFFLED]:.1f} % with shuffled wordings ({_in_points(shuffled)})",
    ),
    study_lib.Claim(
      "the prior replaces the prompt",
      "not supported" if replaced.high < 0 else "supported" if replaced.low > 0 else "inconclusive",
      f"{accuracy['queryable_prior']:.1f} % against {accuracy['lora+prompt']:.1f} % of LoRA with"
      f" the prompt: {_in_points(replaced)} points",
    ),
    *language_deciding.claims(results),
    *_likelihoods(results),
  ]


def _points(results: committed.Results, ours: str, theirs: str) -> statistics.Interval:
  """The paired difference of two ways in points of exact match in new wordings."""
  final = results.study.stage("final")
  scores = final.pivot(index="seed", columns="arm", values="test_accuracy")
  both = 100 * scores[[ours, theirs]].dropna()
  return statistics.paired_interval(both[ours], both[theirs])


def _in_points(ends: statistics.Interval) -> str:
  return tables.with_interval(*ends, tables.percent)


def _likelihoods(results: committed.Results) -> list[study_lib.Claim]:
  """Whether the routed method has fewer nats per test answer token, in each study of two."""
  claim_list = []
  for study, data in PAIRS.items():
    if not results.of(study).exists:
      continue
    row = language_tables.pair(results.of(study)).iloc[-1]
    low, high = row["test_nats_low"], row["test_nats_high"]
    verdict = "supported" if high < 0 else "not supported" if low > 0 else "no difference seen"
    ends = tables.with_interval(
      row["test_nats_difference"], low, high, lambda x: tables.signed(x, 2)
    )
    claim_list.append(
      study_lib.Claim(
        f"{row['label']} has a better likelihood than LoRA on {data}",
        verdict,
        f"{ends} nats per answer token, {row['seeds']:.0f} seeds (Student)",
        f"{study} {row['arm']}",
      )
    )
  return claim_list


def draw(results: committed.Results) -> figure.Figure:
  """Exact match by method in new and in known wordings."""
  return plot_accuracy.splits(results.study, results.summary).figure


def _pair_table(study: str, results: committed.Results) -> str:
  return language_tables.pair_table(results.of(study))


STUDY = study_lib.Study(
  name="language_accuracy",
  question="What does the instruction prior give a language model?",
  about="SmolLM2-135M-Instruct is fine-tuned for 50 steps on six tasks of instruction-induction"
  " whose inputs do not tell the task. The instruction stands in the prompt, enters the"
  " weights as a prior, does both or neither; exact match is of free generation, with new"
  " wordings. With the prompt the routing is inert (support 5.03 at the start, 5.01 at the"
  " end; 1.0164 nats as trained, 1.0156 with equal weights), so that the tie with LoRA says"
  " nothing about routing.",
  config="configs/llm.py:induction",
  results="induction",
  claims=claims,
  tables={
    "language_deciding": language_tables.deciding,
    "language_tasks": language_tables.by_task,
    "language_rates": language_tables.rates,
    "language_reasons": language_tables.reasons,
    "language_combined": language_tables.combined,
    **language_deciding.tables_of(committed.results("induction")),
    "language_swap": language_tables.swap,
    **{f"language_{study}": functools.partial(_pair_table, study) for study in PAIRS},
  },
  caption="Exact match of greedily generated answers in percent on 100 held-out inputs of each of"
  " six tasks of instruction-induction, SmolLM2-135M-Instruct after 50 steps, with new and with"
  " known wordings of the instruction. Bars are Student's 95 % intervals over three seeds; the"
  " broken lines are the model before training.",
  draw=draw,
  keep_curves=True,
  report_figures={
    "language_tasks": (
      "tasks",
      "Exact match in percent by task, in new and in known wordings of the instruction, mean over"
      " the final seeds of a method.",
    )
  },
  position=50,
)
