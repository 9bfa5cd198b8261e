"""Built-in instruction data: eighteen small tasks over words and numbers, without a download.

Tasks of one *kind* share their inputs: 'otter' is an input of the first letter, the plural and the
length. Only the instruction distinguishes these tasks. The inputs of training, validation and test
are disjoint across all tasks: a word, number or pair of numbers in a test input of any task is in
no training input of any task.
"""

from collections.abc import Callable, Sequence

import numpy as np

from qlora_jax.data.text import records, word_tasks_text

ROWS_PER_TASK = {"train": 200, "validation": 40, "test": 60}
MAX_NUMBER = 1000  # exclusive bound of numbers
MAX_TERM = 100  # exclusive bound of the numbers of a pair
_SHARES = {"train": 0.55, "validation": 0.15, "test": 0.3}

_SMALL = (
  "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
  "sixteen seventeen eighteen nineteen"
)
_ROUND = "zero ten twenty thirty forty fifty sixty seventy eighty ninety"
_UNITS, _TENS = _SMALL.split(), _ROUND.split()


def plural(word: str) -> str:
  """The plural of a noun of the built-in list."""
  if word in word_tasks_text.IRREGULAR_PLURALS:
    return word_tasks_text.IRREGULAR_PLURALS[word]
  if word.endswith("y") and word[-2] not in "aeiou":
    return word[:-1] + "ies"
  if word.endswith(("s", "x", "z", "sh", "ch")):
    return word + "es"
  return word + "s"


def number_words(number: int, joint: str = " ") -> str:
  """English words for 0 to 999; `joint` separates the hundreds and the rest."""
  hundreds, rest = divmod(number, 100)
  tens, units = divmod(rest, 10)
  if rest < 20:
    small = _UNITS[rest]
  else:
    small = _TENS[tens] + (f"-{_UNITS[units]}" if units else "")
  if not hundreds:
    return small
  return f"{_UNITS[hundreds]} hundred" + (f"{joint}{small}" if rest else "")


def _spoken(number: int) -> tuple[str, ...]:
  """Accepted readings, without repetition: 'two hundred five', 'two hundred and five'."""
  return tuple(dict.fromkeys((number_words(number), number_words(number, " and "))))


# Maps an input to the prompt and the accepted answers.
_Task = Callable[[object], tuple[str, tuple[str, ...]]]


def _word_task(answer: Callable[[str], str]) -> _Task:
  return lambda word: (word, (answer(word),))


def _pair_task(answer: Callable[[int, int], int]) -> _Task:
  return lambda pair: (f"{pair[0]} {pair[1]}", (str(answer(*pair)),))


def _list_task(answer: Callable[[Sequence[str]], str]) -> _Task:
  return lambda words: (" ".join(words), (answer(words),))


KINDS: dict[str, dict[str, _Task]] = {
  "word": {
    "first_letter": _word_task(lambda word: word[0]),
    "second_letter": _word_task(lambda word: word[1]),
    "last_letter": _word_task(lambda word: word[-1]),
    "reverse_word": _word_task(lambda word: word[::-1]),
    "plural": _word_task(plural),
    "uppercase": _word_task(str.upper),
    "count_letters": _word_task(lambda word: str(len(word))),
    "spell": _word_task(" ".join),
  },
  "number": {
    "number_to_words": lambda number: (str(number), _spoken(number)),
    "next_number": lambda number: (str(number), (str(number + 1),)),
  },
  "number_word": {
    "words_to_number": lambda number: (number_words(number), (str(number),)),
  },
  "pair": {
    "sum": _pair_task(lambda a, b: a + b),
    "difference": _pair_task(lambda a, b: abs(a - b)),
    "larger_number": _pair_task(max),
  },
  "list": {
    "sort_words": _list_task(lambda words: " ".join(sorted(words))),
    "second_word": _list_task(lambda words: words[1]),
    "last_word": _list_task(lambda words: words[-1]),
    "count_words": _list_task(lambda words: str(len(words))),
  },
}
TASKS = tuple(task for tasks in KINDS.values() for task in tasks)


def load(
  *, seed: int = 0, tasks: Sequence[str] | None = None, train_rows: int | None = None
) -> records.TextData:
  """Generates the data set; reads no files.

  Args:
    seed: draws the training and validation inputs and the wordings. The test examples are the same
      for every seed.
    tasks: some of `TASKS`; None for all. The inputs of a task do not depend on the selection.
    train_rows: maximum number of training rows per task; None for all.

  Raises:
    UserError: an unknown task (the message lists the known ones) or a negative seed.
  """
  selected_tasks = records.choose_tasks(tasks, TASKS, "word_tasks")
  rows: dict[str, list[records.Row]] = {split: [] for split in ROWS_PER_TASK}
  for split, number in ROWS_PER_TASK.items():
    for kind, functions in KINDS.items():
      # One draw per kind: all tasks of a kind have the same inputs.
      rng = records.stream("word_tasks", split, kind, seed=0 if split == "test" else seed)
      inputs = _inputs(kind, split, number, rng)
      for task in functions:
        if task in selected_tasks:
          rows[split] += [
            records.Row(task, *functions[task](task_input), f"word_tasks/{split}/{task}, row {i}")
            for i, task_input in enumerate(inputs)
          ]
  wordings = {task: word_tasks_text.WORDINGS[task] for task in selected_tasks}
  return records.assemble("word_tasks", rows, wordings, seed=seed, train_rows=train_rows)


def _inputs(kind: str, split: str, number: int, rng: np.random.Generator) -> list:
  """Draws distinct inputs of a kind from the split's part of all inputs."""
  words = (*word_tasks_text.NOUNS, *word_tasks_text.IRREGULAR_PLURALS)
  if kind == "word":
    pool = _part("words", len(words), split)
    return [words[i] for i in rng.permutation(pool)[:number]]
  if kind in ("number", "number_word"):
    pool = _part("numbers", MAX_NUMBER, split)
    return [int(i) for i in rng.permutation(pool)[:number]]
  if kind == "pair":
    larger, smaller = np.tril_indices(MAX_TERM, -1)  # unordered: '3 5' and '5 3' are one input
    pair_indices = rng.permutation(_part("pairs", len(larger), split))[:number]
    swapped = rng.random(number) < 0.5
    pairs = np.stack([larger[pair_indices], smaller[pair_indices]], axis=1)
    pairs = np.where(swapped[: len(pairs), None], pairs[:, ::-1], pairs)
    return [(int(a), int(b)) for a, b in pairs]
  pool = _part("words", len(words), split)
  lists: dict[frozenset[str], list[str]] = {}
  while len(lists) < number:
    members = [words[i] for i in rng.permutation(pool)[: rng.integers(3, 7)]]
    lists[frozenset(members)] = members
  return list(lists.values())


def _part(vocabulary: str, size: int, split: str) -> np.ndarray:
  """The split's part of `range(size)`; the same for every seed."""
  shuffled = records.stream("word_tasks", "parts", vocabulary).permutation(size)
  ends = np.round(np.cumsum([0, *_SHARES.values()]) * size).astype(int)
  position = list(_SHARES).index(split)
  return shuffled[ends[position] : ends[position + 1]]
