"""The built-in tasks: right answers, inputs disjoint between splits, shared between tasks."""

import re

import numpy as np
import pytest

from qlora_jax import errors
from qlora_jax.data.text import pipeline, records, word_tasks, word_tasks_text


@pytest.fixture(scope="module")
def data():
  return pipeline.load("word_tasks", seed=3)


def _units(examples):
  """Words, number values and unordered pairs that occur in the inputs."""
  units = set()
  for example in examples:
    if example.task in word_tasks.KINDS["pair"]:
      units.add(tuple(sorted(map(int, example.prompt.split()))))
    elif example.task == "words_to_number":
      units.add(int(example.answers[0]))
    elif example.task in word_tasks.KINDS["number"]:
      units.add(int(example.prompt))
    else:
      units.update(example.prompt.split())
  return units


def test_no_input_of_one_split_occurs_in_another_in_any_task_or_seed():
  for train_seed, other_seed in ((0, 0), (0, 5)):
    train = pipeline.load("word_tasks", seed=train_seed).splits["train"]
    other = pipeline.load("word_tasks", seed=other_seed).splits
    parts = [_units(train), _units(other["validation"]), _units(other["test"])]
    assert all(len(part) > 100 for part in parts)
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


@pytest.mark.parametrize("split", ["train", "validation", "test", "test_seen"])
def test_every_task_has_its_rows_and_no_row_twice(data, split):
  expected = word_tasks.ROWS_PER_TASK[split.removesuffix("_seen")]
  for task in word_tasks.TASKS:
    prompts = [example.prompt for example in data.splits[split] if example.task == task]
    assert len(prompts) == len(set(prompts)) == expected, task


def test_only_the_instruction_tells_tasks_of_one_kind_apart(data):
  for tasks in word_tasks.KINDS.values():
    prompts = [{o.prompt for o in data.splits["test"] if o.task == task} for task in tasks]
    assert all(other == prompts[0] for other in prompts) or "sort_words" in tasks
    assert all(other & prompts[0] for other in prompts)


def test_seen_and_heldout_wordings_are_kept_apart(data):
  assert len(word_tasks.TASKS) >= 12 and tuple(word_tasks_text.WORDINGS) == word_tasks.TASKS
  texts = [re.sub(r"\W", "", text.casefold()) for text in data.instruction_texts]
  assert len(set(texts)) == len(texts) == 9 * len(word_tasks.TASKS)
  for split, ids in (
    ("train", data.seen_ids),
    ("validation", data.seen_ids),
    ("test", data.heldout_ids),
    ("test_seen", data.seen_ids),
  ):
    for task in word_tasks.TASKS:
      used = {example.paraphrase_id for example in data.splits[split] if example.task == task}
      assert used == set(ids[task])
  for examples in data.splits.values():
    assert all(data.instruction_texts[o.paraphrase_id] == o.instruction for o in examples)


def test_exchanged_rows_keep_their_words_and_lose_their_task(data):
  exchanged = records.exchanged(data, seed=1)
  for split, examples in exchanged.splits.items():
    original = data.splits[split]
    assert [(o.prompt, o.answers, o.task) for o in examples] == [
      (o.prompt, o.answers, o.task) for o in original
    ]
    assert sorted(o.paraphrase_id for o in examples) == sorted(o.paraphrase_id for o in original)
    assert all(data.instruction_texts[o.paraphrase_id] == o.instruction for o in examples)
    seen = data.seen_ids if split != "test" else data.heldout_ids
    still = np.mean([o.paraphrase_id in seen[o.task] for o in examples])
    assert still < 3 / len(word_tasks.TASKS)
  other = records.exchanged(data, seed=2)
  assert other.splits["test"] == exchanged.splits["test"]
  assert other.splits["train"] != exchanged.splits["train"]


def test_test_rows_are_the_same_for_every_seed_and_training_rows_are_not(data):
  other, again = pipeline.load("word_tasks", seed=4), pipeline.load("word_tasks", seed=3)
  assert data.splits == again.splits
  assert data.splits["test"] == other.splits["test"]
  assert data.splits["test_seen"] == other.splits["test_seen"]
  assert data.splits["train"] != other.splits["train"]


def test_answers_are_right(data):
  checks = {
    "first_letter": lambda p: p[0],
    "reverse_word": lambda p: "".join(reversed(p)),
    "count_letters": lambda p: str(len(p)),
    "sum": lambda p: str(sum(map(int, p.split()))),
    "difference": lambda p: str(abs(int(p.split()[0]) - int(p.split()[1]))),
    "larger_number": lambda p: str(max(map(int, p.split()))),
    "next_number": lambda p: str(int(p) + 1),
    "sort_words": lambda p: " ".join(sorted(p.split())),
    "last_word": lambda p: p.split()[-1],
    "count_words": lambda p: str(p.count(" ") + 1),
  }
  for example in data.splits["train"]:
    if example.task in checks:
      assert example.answers == (checks[example.task](example.prompt),)


def test_plurals_and_number_words():
  words = ["apple", "box", "city", "toy", "church", "bus", "child", "knife", "brush", "key"]
  expected = "apples boxes cities toys churches buses children knives brushes keys"
  assert " ".join(map(word_tasks.plural, words)) == expected
  numbers = {0: "zero", 13: "thirteen", 40: "forty", 99: "ninety-nine", 300: "three hundred"}
  assert {n: word_tasks.number_words(n) for n in numbers} == numbers
  data = pipeline.load("word_tasks", tasks=["number_to_words"])
  answers = {example.prompt: example.answers for split in data.splits.values() for example in split}
  with_hundreds = next(p for p in answers if int(p) > 100 and int(p) % 100)
  assert " and " not in answers[with_hundreds][0] and " and " in answers[with_hundreds][1]
  assert len({word_tasks.number_words(n) for n in range(1000)}) == 1000


def test_words_are_plain_and_listed_once():
  words = (*word_tasks_text.NOUNS, *word_tasks_text.IRREGULAR_PLURALS)
  assert len(set(words)) == len(words)
  assert all(re.fullmatch("[a-z]{2,}", word) for word in words)


def test_a_choice_of_tasks_leaves_their_rows_as_they_are(data):
  some = pipeline.load("word_tasks", seed=3, tasks=("plural", "sum"), train_rows=7)
  assert some.task_names == ("plural", "sum") and len(some.splits["train"]) == 14
  for task in some.task_names:
    whole = {o.prompt for o in data.splits["test"] if o.task == task}
    assert {o.prompt for o in some.splits["test"] if o.task == task} == whole


def test_mistakes_are_named():
  with pytest.raises(errors.UserError, match=r"unknown task 'plurals'.*first_letter.*count_words"):
    pipeline.load("word_tasks", tasks=["plurals"])
  with pytest.raises(errors.UserError, match="tasks of word_tasks is empty"):
    pipeline.load("word_tasks", tasks=[])
  with pytest.raises(errors.UserError, match="data seed is -1"):
    pipeline.load("word_tasks", seed=-1)
  with pytest.raises(errors.UserError, match="train_rows is 0"):
    pipeline.load("word_tasks", train_rows=0)
  with pytest.raises(errors.UserError, match=r"unknown data set 'wordtasks'.*word_tasks.*gsm8k"):
    pipeline.load("wordtasks")
  with pytest.raises(errors.UserError, match="manual_folder has no meaning"):
    pipeline.load("word_tasks", manual_folder="somewhere")
  with pytest.raises(errors.UserError, match="tasks has no meaning"):
    pipeline.load("gsm8k", tasks=["x"])
