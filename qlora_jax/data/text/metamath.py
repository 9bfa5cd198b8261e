"""MetaMathQA for training and GSM8K for scoring, as the three .jsonl files of a folder.

Yu et al., "MetaMath" (arXiv 2309.12284): 395,000 questions bootstrapped from the training splits of
GSM8K and MATH. The splits equal those of PEFT's `method_comparison/MetaMathQA/data.py`: training
examples of at most 1300 characters, the same 50 problems of GSM8K's training split for validation,
and the whole GSM8K test split.

  python -m qlora_jax.data.text.metamath --out=data/metamath
"""

import argparse
import json
import pathlib
import shutil
import sys
import urllib.request
from collections.abc import Iterable, Sequence

import numpy as np

from qlora_jax import errors, files
from qlora_jax.data.text import gsm8k, published

REVISION = "aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18"  # the revision of PEFT's published runs
URL = (
  f"https://huggingface.co/datasets/meta-math/MetaMathQA/resolve/{REVISION}/MetaMathQA-395K.json"
)
ROWS = 395_000
MAX_CHARACTERS = 1300  # of question and answer together, so that they fit 768 tokens
NUM_VALIDATION = 50
TASK = "gsm8k"  # answers are compared as numbers, see `scoring`


def convert(metamath: pathlib.Path, problems: pathlib.Path, out: pathlib.Path) -> dict[str, int]:
  """Writes `train.jsonl`, `validation.jsonl` and `test.jsonl`.

  Args:
    metamath: the published `MetaMathQA-395K.json`.
    problems: folder with GSM8K's `train.jsonl` and `test.jsonl`.
    out: folder of the three files; created if missing.

  Returns:
    Number of rows per split.

  Raises:
    UserError: a file is missing or does not have the published form.
  """
  training = [
    {"prompt": row["query"], "completion": row["response"], "task": TASK}
    for row in _read(metamath)
    if len(f"{row['query']} {row['response']}") <= MAX_CHARACTERS
  ]
  gsm8k_splits = {}
  for split in ("train", "test"):
    path = problems / f"{split}.jsonl"
    if not path.is_file():
      raise errors.UserError(f"--gsm8k: {problems} has no file {split}.jsonl")
    gsm8k_splits[split] = [
      {"prompt": row.prompt, "completion": row.answers[0], "task": TASK}
      for row in gsm8k.parse(path, split)
    ]
  order = np.arange(len(gsm8k_splits["train"]))
  np.random.RandomState(0).shuffle(order)  # PEFT uses NumPy's legacy generator
  output_splits = {
    "train": training,
    "validation": [gsm8k_splits["train"][index] for index in order[:NUM_VALIDATION]],
    "test": gsm8k_splits["test"],
  }
  out.mkdir(parents=True, exist_ok=True)
  for name, rows in output_splits.items():
    _write(out / f"{name}.jsonl", rows)
  return {name: len(rows) for name, rows in output_splits.items()}


def _read(path: pathlib.Path) -> list[dict[str, str]]:
  try:
    rows = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise errors.UserError(f"--metamath: {path} does not exist") from error
  except ValueError as error:
    raise errors.UserError(f"--metamath: {path} is not JSON; download it again") from error
  if not isinstance(rows, list) or not all(
    isinstance(row, dict)
    and isinstance(row.get("query"), str)
    and isinstance(row.get("response"), str)
    and row["response"].strip()
    for row in rows
  ):
    raise errors.UserError(f"--metamath: {path} must be a list of objects with query and response")
  return rows


def _write(path: pathlib.Path, rows: Iterable[dict]) -> None:
  with files.replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _download(folder: pathlib.Path) -> pathlib.Path:
  """Downloads the published file (396 MB) if it is missing."""
  path = folder / URL.rpartition("/")[2]
  if not path.is_file():
    try:
      with (
        urllib.request.urlopen(URL, timeout=published.TIMEOUT) as response,
        files.replacing(path) as temporary,
        temporary.open("wb") as file,
      ):
        shutil.copyfileobj(response, file)
    except OSError as error:
      reason = " ".join(str(getattr(error, "reason", error)).split())
      raise errors.UserError(
        f"cannot download {URL} ({reason}); check the network, or give the file with --metamath"
      ) from error
  num_rows = len(_read(path))
  if num_rows != ROWS:
    raise errors.UserError(
      f"{path} has {num_rows} rows, the published file {ROWS}; delete it to download again"
    )
  return path


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code, 2 for a user error."""
  parser = argparse.ArgumentParser(
    prog="python -m qlora_jax.data.text.metamath", description=__doc__.split("\n")[0]
  )
  parser.add_argument("--out", default="data/metamath", help="folder of the three files")
  parser.add_argument("--metamath", help="MetaMathQA-395K.json; downloaded by default")
  parser.add_argument("--gsm8k", help="folder with GSM8K's files; downloaded by default")
  options = parser.parse_args(arguments)
  out = pathlib.Path(options.out)
  try:
    out.mkdir(parents=True, exist_ok=True)
    metamath = pathlib.Path(options.metamath) if options.metamath else _download(out)
    problems = pathlib.Path(options.gsm8k) if options.gsm8k else _gsm8k(out)
    rows = convert(metamath, problems, out)
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except OSError as error:
    print(f"error: --out: {out} cannot be written ({error.strerror})", file=sys.stderr)
    return 2
  print(f"{out}: " + ", ".join(f"{number:,} {name}" for name, number in rows.items()))
  return 0


def _gsm8k(out: pathlib.Path) -> pathlib.Path:
  """Downloads GSM8K's published files to a subfolder and checks their SHA-256."""
  folder = out / "gsm8k"
  folder.mkdir(exist_ok=True)
  for name, sha256 in gsm8k.FILES.items():
    shutil.copyfile(published.download(f"{gsm8k.BASE}/{name}", sha256, folder), folder / name)
  return folder


if __name__ == "__main__":
  sys.exit(main())
