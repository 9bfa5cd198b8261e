"""All questions, and the figures of the report that documents show beside theirs."""

import pathlib
import tempfile
from collections.abc import Iterator, Sequence

from experiments.questions import (
  ablations,
  bases,
  committed,
  depth,
  error,
  factorial,
  factorial_language,
  language,
  noise,
  question,
  scaling,
  stability,
  stream,
)
from experiments.report import figures as report_figures
from qlora_jax import errors

QUESTIONS = {
  each.QUESTION.name: each.QUESTION
  for each in (
    error,
    bases,
    noise,
    stability,
    language,
    scaling,
    factorial,
    factorial_language,
    ablations,
    depth,
    stream,
  )
}
# Name in docs/figures -> (study, name in its report, what it shows).
REPORTS = {
  "difference": (
    "regression",
    "difference",
    "Mean paired difference in test error of every method to its baseline, in percent, with 95 %"
    " bootstrap intervals over ten seeds; a filled mark's interval leaves out zero.",
  ),
  "noise": (
    "regression",
    "noise",
    "Test error (units of the source's variance) against the noise in the training targets, with"
    " 95 % bootstrap intervals over ten seeds.",
  ),
  "learning_rates": (
    "regression",
    "learning_rates",
    "Validation error of the search against the learning rate; bands reach from the least to the"
    " greatest of three seeds, a ring marks the chosen rate.",
  ),
  "curves": (
    "regression",
    "curves",
    "Validation error by training step of the final runs; bands reach from the least to the"
    " greatest of ten seeds.",
  ),
  "routing": (
    "regression",
    "routing",
    "Mean routing weight by block and atom, of one final run a method.",
  ),
  "parameters": (
    "regression",
    "parameters",
    "Test error against the number of trainable parameters, with 95 % bootstrap intervals.",
  ),
  "language_tasks": (
    "induction",
    "tasks",
    "Exact match in percent by task, in new and in known wordings of the instruction, mean over the"
    " final seeds of a method.",
  ),
}


def captions() -> dict[str, str]:
  """Figure to what it shows and the commands that make its results and itself."""
  found = {name: each.told() for name, each in QUESTIONS.items()}
  for name, (study, _, shown) in REPORTS.items():
    of = next(each for each in QUESTIONS.values() if each.study == study)
    found[name] = (
      f"{shown} Results: `{of.command}`. Figure: `python -m experiments.questions {name}`."
    )
  return found


def write(names: Sequence[str] = ()) -> Iterator[pathlib.Path]:
  """Remakes figures, all whose results are there unless named; yields each one's path.

  Raises:
    UserError: an unknown name, or a figure whose results are not there.
  """
  known = (*QUESTIONS, *REPORTS)
  for name in names:
    if name not in known:
      raise errors.UserError(f"figure {name!r} is unknown; use one of {', '.join(known)}")
    if name in QUESTIONS and not QUESTIONS[name].ready:
      raise errors.UserError(
        f"figure {name}: there are no results in experiments/results/{QUESTIONS[name].study}"
      )
  for name, each in QUESTIONS.items():
    if each.ready and (name in names or not names):
      yield each.write()
  wanted = [name for name in REPORTS if name in names or not names]
  with tempfile.TemporaryDirectory() as temporary:
    for study in dict.fromkeys(REPORTS[name][0] for name in wanted):
      made = pathlib.Path(temporary, study)
      report_figures.draw(committed.study(study), committed.summary(study), made)
    for name in wanted:
      study, own, _ = REPORTS[name]
      target = question.folder() / name
      for suffix in (".svg", ".png"):
        made = pathlib.Path(temporary, study, own).with_suffix(suffix)
        target.with_suffix(suffix).write_bytes(made.read_bytes())
      question.settle(target.with_suffix(".svg"))
      yield target.with_suffix(".png")
