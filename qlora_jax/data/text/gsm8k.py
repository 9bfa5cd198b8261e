"""TFDS builder of GSM8K: 7473 training and 1319 test problems of grade-school mathematics.

Cobbe et al., "Training Verifiers to Solve Math Word Problems" (arXiv 2110.14168). The
training answer is the whole worked solution, which ends with the number after `####`. The
calculator annotations (`<<48/2=24>>`) are removed, because this package has no calculator.
"""

import json
import pathlib
import re

import tensorflow_datasets as tfds

from qlora_jax import errors
from qlora_jax.data.text import published, records, scoring

COMMIT = "3101c7d5072418e28b9008a6636bde82a006892c"
REPOSITORY = "openai/grade-school-math"
BASE = f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}/grade_school_math/data"
FILES = {
  "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
  "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
NUM_VALIDATION = 473
WORDINGS = records.Wordings(
  seen=(
    "Solve the problem step by step and give the final number after ####.",
    "Work out the answer to this word problem; write it after ####.",
    "Explain your reasoning, then write #### and the result.",
    "Answer the question with a short calculation that ends with #### and the number.",
    "Find the number that is asked for. Show the steps and end with #### and the answer.",
    "Do the maths in this story and put the result behind ####.",
  ),
  heldout=(
    "Reason through the exercise; the last line should be #### followed by the solution.",
    "Compute what is asked, showing your work, and finish with #### and the value.",
    "Here is a grade-school exercise. Think it through and close with #### and the figure.",
  ),
)

_CALCULATION = re.compile(r"<<[^<>]*>>")


class Gsm8k(tfds.core.GeneratorBasedBuilder):
  """Published problems and solutions, unchanged."""

  # Set here: TFDS finds it with importlib_resources, which is not one of its dependencies.
  code_path = pathlib.Path(__file__)
  VERSION = tfds.core.Version("1.0.0")  # increase it when a row changes

  def _info(self) -> tfds.core.DatasetInfo:
    return published.dataset_info(
      self,
      description=f"GSM8K, {REPOSITORY} at {COMMIT[:8]}.",
      citation="Cobbe et al. (2021), Training Verifiers to Solve Math Word Problems, 2110.14168",
      homepage=f"https://github.com/{REPOSITORY}",
      license="MIT",
    )

  def _split_generators(self, dl_manager):
    paths = published.locate(self.builder_config, dl_manager, BASE, FILES)
    rows = {split: parse(paths[f"{split}.jsonl"], split) for split in ("train", "test")}
    return {split: published.blocks(split_rows) for split, split_rows in rows.items()}

  def _generate_examples(self):
    raise NotImplementedError("_split_generators returns the examples of every split")


def load(
  *,
  seed: int = 0,
  data_dir: str | pathlib.Path,
  manual_folder: str | pathlib.Path | None = None,
  train_rows: int | None = None,
) -> records.TextData:
  """Loads the data set; the first use prepares it.

  The validation split has 473 of the published training problems.

  Args:
    seed: see `records.assemble`.
    data_dir: directory of all prepared data sets.
    manual_folder: folder with `train.jsonl` and `test.jsonl`; None to download.
    train_rows: maximum number of training rows; None for all.

  Raises:
    UserError: a missing or malformed file, or a failed download.
  """
  builder_config = published.config(FILES, manual_folder)
  stored = published.read(Gsm8k, builder_config, data_dir, ("train", "test"))
  cleaned = {split: [_without_calculations(row) for row in rows] for split, rows in stored.items()}
  train, validation = records.take_validation(cleaned["train"], 0.1, NUM_VALIDATION, "gsm8k")
  rows = {"train": train, "validation": validation, "test": cleaned["test"]}
  return records.assemble("gsm8k", rows, {"gsm8k": WORDINGS}, seed=seed, train_rows=train_rows)


def parse(path: pathlib.Path, split: str) -> list[records.Row]:
  """Reads one published file.

  Raises:
    UserError: a line is not JSON, lacks a field, or its answer has no number after `####`; the
      message names file and line.
  """
  try:
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
  except UnicodeDecodeError as error:
    raise errors.UserError(f"{split}.jsonl: is not UTF-8 ({error.reason})") from error
  rows = []
  for number, line in enumerate(lines, start=1):
    source = f"{split}.jsonl line {number}"
    try:
      fields = json.loads(line)
    except json.JSONDecodeError as error:
      raise errors.UserError(f"{source}: is not JSON ({error})") from error
    json_object = fields if isinstance(fields, dict) else {}
    question, answer = json_object.get("question"), json_object.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
      raise errors.UserError(f"{source}: needs the texts 'question' and 'answer'")
    if "####" not in answer or scoring.final_number(answer) is None:
      raise errors.UserError(f"{source}: the answer has no number after ####")
    rows.append(records.Row("gsm8k", question.strip(), (answer.strip(),), source))
  return rows


def _without_calculations(row: records.Row) -> records.Row:
  return records.Row(
    row.task, row.prompt, tuple(_CALCULATION.sub("", answer) for answer in row.answers), row.source
  )
