"""Exact match: differences that count and differences that do not."""

import decimal

import pytest

from qlora_jax.data.text import records, scoring


@pytest.mark.parametrize(
  ("prediction", "answers", "task", "correct"),
  [
    ("  Paris. ", ("paris",), "", True),
    ("the  cat\tsat", ("The cat sat.",), "", True),
    ('"Paris"', ("Paris",), "", True),
    ("Paris\nThe capital is old", ("Paris",), "", True),
    ("Paris, France", ("Paris",), "", False),
    ("", ("Paris",), "", False),
    ("?", ("?",), "", True),
    ("?", ("!",), "", False),
    ("Mal", ("Zeit", "Mal"), "translation_en-de", True),
    ("caf\u0065\u0301", ("café",), "", True),
    ("OTTER", ("OTTER",), "uppercase", True),
    ("otter", ("OTTER",), "uppercase", False),
    ("bird, cow", ("cow, bird",), "taxonomy_animal", True),
    ("bird", ("cow, bird",), "taxonomy_animal", False),
    ("bird, cow", ("cow, bird",), "", False),
    ("So 3+4 = 7\n#### 7", ("#### 7",), "gsm8k", True),
    ("The answer is $1,200.00.", ("#### 1200",), "gsm8k", True),
    ("#### 7 because 3 + 4", ("#### 7",), "gsm8k", True),
    ("seven", ("#### 7",), "gsm8k", False),
    ("#### 17", ("#### 7",), "gsm8k", False),
  ],
)
def test_is_correct(prediction, answers, task, correct):
  assert scoring.is_correct(prediction, answers, task) is correct


@pytest.mark.parametrize(
  ("text", "number"),
  [
    ("#### -5", "-5"),
    ("it is 10-5", "5"),
    ("she has 3. Then 4.", "4"),
    ("0.25 of it", "0.25"),
    ("#### 1,000,000", "1000000"),
    ("12\n#### none", "12"),
    ("none", None),
  ],
)
def test_final_number(text, number):
  assert scoring.final_number(text) == (None if number is None else decimal.Decimal(number))


def test_accuracy_is_reported_by_task_and_averaged_over_tasks():
  examples = [
    records.Example("", "", (answer,), task, 0)
    for answer, task in (("a", "one"), ("b", "one"), ("c", "one"), ("d", "two"))
  ]
  scores = scoring.accuracy(["a", "b", "x", "x"], examples)
  assert scores == {
    "accuracy": pytest.approx(1 / 3),
    "accuracy_examples": 0.5,
    "one/accuracy": pytest.approx(2 / 3),
    "two/accuracy": 0.0,
  }
  assert scoring.accuracy([], []) == {}
  with pytest.raises(ValueError, match="zip"):
    scoring.accuracy(["a"], examples)
