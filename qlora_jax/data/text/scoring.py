"""Exact match per task; a prediction is correct if it equals any accepted answer.

Only the first line of a prediction counts. Both texts are normalised before the comparison: Unicode
NFKC, case folding, one space per run of white space, no quotation marks around the whole text, no
punctuation (. , ; : ! ?) at its end. Exceptions: `uppercase` keeps the case. Tasks whose answer is
an unordered set of words compare sets. `gsm8k` compares final numbers.

The authors' script for Instruction Induction is more lenient: it removes all punctuation, gives
partial credit in two tasks and accepts a synonym anywhere in the prediction. Its scores are
therefore at least as high as these.
"""

import decimal
import re
import unicodedata
from collections.abc import Sequence

from qlora_jax.data.text import records

CASE_TASKS = frozenset({"uppercase"})
SET_TASKS = frozenset({"taxonomy_animal", "orthography_starts_with"})
NUMBER_TASKS = frozenset({"gsm8k"})

_NUMBER = re.compile(r"(?:(?<!\d)-)?\$?(?:\d[\d,]*\.?\d*|\.\d+)")


def normalise(text: str, keep_case: bool = False) -> str:
  """Returns the normalised form of a text that comparisons use."""
  text = " ".join(unicodedata.normalize("NFKC", text).split())
  text = text if keep_case else text.casefold()
  while True:
    bare = text.rstrip(" .,;:!?")
    if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "\"'`":
      bare = bare[1:-1].strip()
    if not bare or bare == text:
      return text  # a text of only punctuation stays unchanged
    text = bare


def final_number(text: str) -> decimal.Decimal | None:
  """The number after the last `####`, else the last number of the text; None without a number.

  Thousands separators, a dollar sign and trailing zeros are ignored: '$1,200.00' is 1200.
  """
  _, mark, marked = text.rpartition("####")
  numbers = _NUMBER.findall(marked) if mark else []
  numbers = numbers[:1] or _NUMBER.findall(text)[-1:]
  return decimal.Decimal(re.sub(r"[$,]", "", numbers[0]).rstrip(".")) if numbers else None


def is_correct(prediction: str, answers: Sequence[str], task: str = "") -> bool:
  """Whether a prediction is one of the accepted answers of a task."""
  if task in NUMBER_TASKS:
    number = final_number(prediction)
    return number is not None and any(number == final_number(answer) for answer in answers)
  lines = prediction.strip().splitlines()
  predicted = normalise(lines[0] if lines else "", task in CASE_TASKS)
  accepted = [normalise(answer, task in CASE_TASKS) for answer in answers]
  if task in SET_TASKS:
    return any(_members(predicted) == _members(answer) for answer in accepted)
  return predicted in accepted


def accuracy(predictions: Sequence[str], examples: Sequence[records.Example]) -> dict[str, float]:
  """Fractions of correct predictions.

  Args:
    predictions: one text per example.
    examples: the examples, in the same order.

  Returns:
    'accuracy' (mean over tasks), 'accuracy_examples' (mean over all examples), and
    '<task>/accuracy' per task; empty without examples.

  Raises:
    ValueError: the numbers of predictions and examples differ.
  """
  by_task: dict[str, list[bool]] = {}
  for prediction, example in zip(predictions, examples, strict=True):
    correct = is_correct(prediction, example.answers, example.task)
    by_task.setdefault(example.task, []).append(correct)
  if not by_task:
    return {}
  means = {task: sum(correct) / len(correct) for task, correct in by_task.items()}
  all_correct = [value for correct in by_task.values() for value in correct]
  return {
    "accuracy": sum(means.values()) / len(means),
    "accuracy_examples": sum(all_correct) / len(all_correct),
    **{f"{task}/accuracy": mean for task, mean in means.items()},
  }


def _members(text: str) -> frozenset[str]:
  return frozenset(text.replace(",", " ").split())
