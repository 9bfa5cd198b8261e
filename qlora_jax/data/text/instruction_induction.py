"""TFDS builder of Instruction Induction: 24 tasks with human wordings of their instructions.

Honovich et al., "Instruction Induction: From Few Examples to Natural Language Task Descriptions"
(arXiv 2205.10782). `raw/induce` is the training split and `raw/execute` the test split, as
published. The validation split is a part of each task's training rows. The human annotations of a
task are its instructions; the last third of them is held out.

Inputs and answers follow the authors' script: `cause_and_effect` asks every pair in both orders,
`common_concept` joins its items with commas, and every listed answer is accepted. One deviation: a
word is not an accepted rhyme of itself.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds

from qlora_jax import errors
from qlora_jax.data.text import instruction_induction_files, published, records

TASKS = instruction_induction_files.TASKS
COMMIT = "f7304ae0a35239c9819a08f93fd58426f6b4e4c1"
REPOSITORY = "orhonovich/instruction-induction"
BASE = f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}/data"
VALIDATION_SHARE = 0.1
MAX_VALIDATION_PROMPTS = 100

# The field that lists further accepted answers, per task.
_ANSWER_FIELDS = {
  "common_concept": "all_common_concepts",
  "rhymes": "other_rhymes",
  "translation_en-de": "possible_translations",
  "translation_en-es": "possible_translations",
  "translation_en-fr": "possible_translations",
  "word_in_context": "possible_outputs",
}
_FOLDERS = {"train": "raw/induce", "test": "raw/execute"}


class InstructionInduction(tfds.core.GeneratorBasedBuilder):
  """Splits: the published training rows, the published test rows, and the annotations."""

  # Set here: TFDS finds it with importlib_resources, which is not one of its dependencies.
  code_path = pathlib.Path(__file__)
  VERSION = tfds.core.Version("1.0.0")  # increase it when a row changes

  def _info(self) -> tfds.core.DatasetInfo:
    return published.dataset_info(
      self,
      description=f"Instruction Induction, {len(TASKS)} tasks, {REPOSITORY} at {COMMIT[:8]}.",
      citation="Honovich et al. (2022), Instruction Induction, arXiv 2205.10782",
      homepage=f"https://github.com/{REPOSITORY}",
      license="Apache-2.0",
    )

  def _split_generators(self, dl_manager):
    paths = published.locate(
      self.builder_config, dl_manager, BASE, instruction_induction_files.FILES
    )
    content = {name: _read_json(path, name) for name, path in paths.items()}
    rows = {
      split: [row for task in TASKS for row in parse(content[f"{folder}/{task}.json"], task, split)]
      for split, folder in _FOLDERS.items()
    }
    # A task's instructions are stored as the answers of one row.
    rows["annotations"] = [
      records.Row(task, "", parse_annotations(content[f"annotations/{task}.json"], task))
      for task in TASKS
    ]
    return {split: published.blocks(split_rows) for split, split_rows in rows.items()}

  def _generate_examples(self):
    raise NotImplementedError("_split_generators returns the examples of every split")


def load(
  *,
  seed: int = 0,
  data_dir: str | pathlib.Path,
  manual_folder: str | pathlib.Path | None = None,
  tasks: Sequence[str] | None = None,
  train_rows: int | None = None,
) -> records.TextData:
  """Loads the data set; the first use prepares it.

  Args:
    seed: see `records.assemble`.
    data_dir: directory of all prepared data sets.
    manual_folder: folder with `raw/induce`, `raw/execute` and `annotations`; None to download.
    tasks: some of `TASKS`; None for all.
    train_rows: maximum number of training rows per task (the published tasks have 15 to 9900).

  Raises:
    UserError: an unknown task, a missing or malformed file, or a failed download.
  """
  selected_tasks = records.choose_tasks(tasks, TASKS, "instruction_induction")
  builder_config = published.config(instruction_induction_files.FILES, manual_folder)
  splits = ("train", "test", "annotations")
  stored = published.read(InstructionInduction, builder_config, data_dir, splits)
  rows: dict[str, list[records.Row]] = {"train": [], "validation": [], "test": []}
  for task in selected_tasks:
    train, validation = records.take_validation(
      [row for row in stored["train"] if row.task == task],
      VALIDATION_SHARE,
      MAX_VALIDATION_PROMPTS,
      f"instruction_induction/{task}",
    )
    rows["train"] += train
    rows["validation"] += validation
    rows["test"] += [row for row in stored["test"] if row.task == task]
  texts = {row.task: row.answers for row in stored["annotations"]}
  wordings = {task: records.split_wordings(texts[task]) for task in selected_tasks}
  return records.assemble("instruction_induction", rows, wordings, seed=seed, train_rows=train_rows)


def parse(content: Any, task: str, split: str) -> list[records.Row]:
  """Converts the content of one published file to rows.

  Raises:
    UserError: a field is missing or of the wrong type; the message names file and example.
  """
  name = f"{_FOLDERS[split]}/{task}.json"
  if not isinstance(content, dict) or not isinstance(content.get("examples"), dict):
    raise errors.UserError(f"{name}: has no object 'examples'")
  rows = []
  for number, example in content["examples"].items():
    source = f"{name}, example {number}"
    if not isinstance(example, dict):
      raise errors.UserError(f"{source}: is {type(example).__name__}, must be an object")
    if task == "cause_and_effect":
      cause, effect = _text(example, "cause", source), _text(example, "effect", source)
      pairs = ((cause, effect), (effect, cause))
      prompts = [f"Sentence 1: {first} Sentence 2: {second}" for first, second in pairs]
      answers = [cause]
    elif task == "common_concept":
      prompts = [", ".join(_texts(example, "items", source))]
      answers = [_text(example, "concept", source)]
    else:
      prompts = [_text(example, "input", source)]
      answers = [_text(example, "output", source)]
    if task in _ANSWER_FIELDS:
      answers += _texts(example, _ANSWER_FIELDS[task], source)
    if task == "rhymes":
      answers = [answer for answer in answers if answer != prompts[0]] or answers
    answers = tuple(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
    if not answers:
      raise errors.UserError(f"{source}: has no answer")
    rows += [records.Row(task, prompt.strip(), answers, source) for prompt in prompts]
  if not rows:
    raise errors.UserError(f"{name}: has no examples")
  return rows


def parse_annotations(content: Any, task: str) -> tuple[str, ...]:
  """Returns the instructions of one published file, without repetition."""
  name = f"annotations/{task}.json"
  if not isinstance(content, dict):
    raise errors.UserError(f"{name}: is {type(content).__name__}, must be an object")
  return tuple(dict.fromkeys(text.strip() for text in _texts(content, "annotations", name)))


def _read_json(path: pathlib.Path, name: str) -> Any:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise errors.UserError(f"{name}: is not JSON ({error})") from error


def _text(fields: dict[str, Any], field: str, source: str) -> str:
  value = fields.get(field)
  if not isinstance(value, str):
    raise errors.UserError(f"{source}: field {field!r} must be a text, is {value!r}")
  return value


def _texts(fields: dict[str, Any], field: str, source: str) -> list[str]:
  value = fields.get(field)
  if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
    raise errors.UserError(f"{source}: field {field!r} must be a list of texts, is {value!r}")
  return value
