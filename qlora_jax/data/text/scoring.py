"""Exact match, by task, with every accepted answer counting.

Before comparison both texts are normalised: Unicode NFKC, first line of the prediction only, case
folded, runs of white space made one space, quotation marks around the whole and punctuation
(. , ; : ! ?) at its end removed. Exceptions: `uppercase` keeps the case; tasks whose answer is a
set of words in no particular order compare sets; `gsm8k` compares final numbers.

The benchmark's own script is more lenient in places (it removes all punctuation, gives partial
credit in two tasks and looks for a synonym anywhere in the prediction), so its numbers are not
lower than these.
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
  """Returns the text as it is compared."""
  text = " ".join(unicodedata.normalize("NFKC", text).split())
  text = text if keep_case else text.casefold()
  while True:
    bare = text.rstrip(" .,;:!?")
    if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "\"'`":
      bare = bare[1:-1].strip()
    if not bare or bare == text:
      return text  # a text of punctuation only stays as it is
    text = bare


def final_number(text: str) -> decimal.Decimal | None:
  """The number after the last `####`, or else the last number of the text; None without one.

  Thousands separators, a dollar sign and trailing zeros do not matter: '$1,200.00' is 1200.
  """
  _, mark, marked = text.rpartition("####")
  found = _NUMBER.findall(marked) if mark else []
  found = found[:1] or _NUMBER.findall(text)[-1:]
  return decimal.Decimal(re.sub(r"[$,]", "", found[0]).rstrip(".")) if found else None


def is_correct(prediction: str, answers: Sequence[str], task: str = "") -> bool:
  """Whether a prediction is one of the accepted answers of a task."""
  if task in NUMBER_TASKS:
    number = final_number(prediction)
    return number is not None and any(number == final_number(answer) for answer in answers)
  lines = prediction.strip().splitlines()
  given = normalise(lines[0] if lines else "", task in CASE_TASKS)
  accepted = [normalise(answer, task in CASE_TASKS) for answer in answers]
  if task in SET_TASKS:
    return any(_members(given) == _members(answer) for answer in accepted)
  return given in accepted


def accuracy(predictions: Sequence[str], examples: Sequence[records.Example]) -> dict[str, float]:
  """Shares of correct predictions.

  Args:
    predictions: a text for each example.
    examples: what they are answers to.

  Returns:
    'accuracy' (the mean of the tasks), 'accuracy_examples' (over all examples), and
    '<task>/accuracy' for every task; empty without examples.

  Raises:
    ValueError: as many predictions as examples are needed.
  """
  by_task: dict[str, list[bool]] = {}
  for prediction, example in zip(predictions, examples, strict=True):
    correct = is_correct(prediction, example.answers, example.task)
    by_task.setdefault(example.task, []).append(correct)
  if not by_task:
    return {}
  means = {task: sum(correct) / len(correct) for task, correct in by_task.items()}
  everything = [one for correct in by_task.values() for one in correct]
  return {
    "accuracy": sum(means.values()) / len(means),
    "accuracy_examples": sum(everything) / len(everything),
    **{f"{task}/accuracy": mean for task, mean in means.items()},
  }


def _members(text: str) -> frozenset[str]:
  return frozenset(text.replace(",", " ").split())
