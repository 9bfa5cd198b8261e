"""Built-in instruction data: eighteen small tasks over words and numbers, without a download.

Tasks of one *kind* share their inputs ('otter' may ask for its first letter, its plural or its
length), so that only the instruction tells them apart. The inputs of training, validation and test
are disjoint across all tasks: a word, number or pair of numbers that occurs in a test input of any
task occurs in no training input of any task.
"""

from collections.abc import Callable, Sequence

import numpy as np

from qlora_jax.data.text import records, word_tasks_text

ROWS_PER_TASK = {"train": 200, "validation": 40, "test": 60}
MAX_NUMBER = 1000  # numbers are below
MAX_TERM = 100  # numbers of a pair are below
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
  """English words for 0 to 999; `joint` stands between the hundreds and the rest."""
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


# For each kind of input its tasks: from the drawn input to the prompt and the accepted answers.
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
  """Makes the data set; reads nothing.

  Args:
    seed: draws the training and validation inputs and the wordings; test examples are the same for
      every seed.
    tasks: some of `TASKS`; None for all. The rows of a task do not depend on the others chosen.
    train_rows: at most so many training rows a task.

  Raises:
    UserError: an unknown task (the message lists the known ones) or a negative seed.
  """
  chosen = records.choose_tasks(tasks, TASKS, "word_tasks")
  rows: dict[str, list[records.Row]] = {split: [] for split in ROWS_PER_TASK}
  for split, number in ROWS_PER_TASK.items():
    for kind, functions in KINDS.items():
      # One draw for all tasks of a kind: the same inputs, asked differently.
      rng = records.stream("word_tasks", split, kind, seed=0 if split == "test" else seed)
      inputs = _inputs(kind, split, number, rng)
      for task in functions:
        if task in chosen:
          rows[split] += [
            records.Row(task, *functions[task](one), f"word_tasks/{split}/{task}, row {i}")
            for i, one in enumerate(inputs)
          ]
  wordings = {task: word_tasks_text.WORDINGS[task] for task in chosen}
  return records.assemble("word_tasks", rows, wordings, seed=seed, train_rows=train_rows)


def _inputs(kind: str, split: str, number: int, rng: np.random.Generator) -> list:
  """Draws different inputs of a kind from the split's own part of all inputs."""
  words = (*word_tasks_text.NOUNS, *word_tasks_text.IRREGULAR_PLURALS)
  if kind == "word":
    pool = _part("words", len(words), split)
    return [words[i] for i in rng.permutation(pool)[:number]]
  if kind in ("number", "number_word"):
    pool = _part("numbers", MAX_NUMBER, split)
    return [int(i) for i in rng.permutation(pool)[:number]]
  if kind == "pair":
    larger, smaller = np.tril_indices(MAX_TERM, -1)  # unordered: '3 5' and '5 3' are one input
    chosen = rng.permutation(_part("pairs", len(larger), split))[:number]
    turned = rng.random(number) < 0.5
    pairs = np.stack([larger[chosen], smaller[chosen]], axis=1)
    pairs = np.where(turned[: len(pairs), None], pairs[:, ::-1], pairs)
    return [(int(a), int(b)) for a, b in pairs]
  pool = _part("words", len(words), split)
  lists: dict[frozenset[str], list[str]] = {}
  while len(lists) < number:
    members = [words[i] for i in rng.permutation(pool)[: rng.integers(3, 7)]]
    lists[frozenset(members)] = members
  return list(lists.values())


def _part(what: str, size: int, split: str) -> np.ndarray:
  """The split's part of `range(size)`; fixed for all time, whatever the seed."""
  shuffled = records.stream("word_tasks", "parts", what).permutation(size)
  ends = np.round(np.cumsum([0, *_SHARES.values()]) * size).astype(int)
  position = list(_SHARES).index(split)
  return shuffled[ends[position] : ends[position + 1]]
