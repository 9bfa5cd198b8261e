"""What does the instruction prior give a language model, with the prompt and without it?"""

import pathlib

from experiments.questions import committed, question
from experiments.report import plot_accuracy, style, tables

_PAIR = ("queryable_prior+prompt", "lora+prompt")


def answer() -> list[tuple[str, str, str]]:
  """Claims about the prior, judged by exact match in wordings that training has not seen."""
  rows = committed.summary("induction")
  with_prompt = rows[(rows["method"] == _PAIR[0]) & (rows["baseline"] == _PAIR[1])].iloc[0]
  ends = [with_prompt[f"difference{end}"] for end in ("", "_low", "_high")]
  own = rows.drop_duplicates("method").set_index("method")["test_accuracy"]
  verdicts = {"better": "supported", "worse": "not supported"}
  carried = own["queryable_prior"] - own["queryable"]
  return [
    (
      "the prior adds to a prompt that the model reads",
      verdicts.get(with_prompt["verdict"], "no difference seen"),
      f"{tables.with_interval(*ends, tables.percent)} points to LoRA with the prompt, paired over"
      f" {with_prompt['num_pairs']:.0f} seeds",
    ),
    (
      "the prior carries an instruction that the prompt does not hold",
      "supported, one seed" if carried > 0 else "not supported",
      f"exact match {own['queryable_prior']:.1f} % with the prior, {own['queryable']:.1f} % without"
      f" it, {own['queryable_prior+shuffled']:.1f} % with shuffled wordings",
    ),
    (
      "the prior replaces the prompt", "not supported",
      f"{own['queryable_prior']:.1f} % against {own['lora+prompt']:.1f} % of LoRA with the prompt",
    ),
  ]  # fmt: skip


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
  " known wordings of the instruction. Bars are 95 % bootstrap intervals where a method has more"
  " than one seed; the broken lines are the model before training.",
  study="induction",
  command="python launch.py --config=configs/llm.py:induction --workdir=runs/induction --sweep",
  draw=draw,
  tables={"language_deciding": table},
  answer=answer,
)
