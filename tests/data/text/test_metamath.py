"""MetaMathQA and GSM8K as a folder of .jsonl files: the splits of PEFT's comparison."""

import json

import numpy as np
import pytest

from qlora_jax.data.text import jsonl, metamath, scoring


@pytest.fixture
def published(tmp_path):
  rows = [{"query": f"What is {n}?", "response": f"The answer is: {n}"} for n in range(5)]
  rows.append({"query": "Long", "response": "x" * 1300})
  (tmp_path / "MetaMathQA-395K.json").write_text(json.dumps(rows))
  for split, count in (("train", 60), ("test", 3)):
    lines = [
      json.dumps({"question": f"{split} {n}", "answer": f"So\n#### {n}"}) for n in range(count)
    ]
    (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
  return tmp_path


def run(published, *more):
  return metamath.main(
    [
      f"--out={published}/out",
      f"--metamath={published}/MetaMathQA-395K.json",
      f"--gsm8k={published}",
      *more,
    ]
  )


def test_the_folder_is_read_by_the_loader_and_scored_by_the_number(published, capsys):
  assert run(published) == 0
  assert "5 train, 50 validation, 3 test" in capsys.readouterr().out  # without the long example
  data = jsonl.load(published / "out")
  assert {name: len(rows) for name, rows in data.splits.items()} == {
    "train": 5,
    "validation": 50,
    "test": 3,
  }
  order = np.arange(60)
  np.random.RandomState(0).shuffle(order)
  assert [row.prompt for row in data.splits["validation"]][:3] == [
    f"train {index}" for index in order[:3]
  ]
  predictions = ["2 and 2. The answer is: 0", "#### 1", "The answer is: 7"]
  scores = scoring.accuracy(predictions, data.splits["test"])
  assert scores["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
  ("file", "text", "message"),
  [
    ("MetaMathQA-395K.json", "[", "is not JSON"),
    ("MetaMathQA-395K.json", '[{"query": "a"}]', "objects with query and response"),
    ("test.jsonl", None, "has no file test.jsonl"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(published, capsys, file, text, message):
  if text is None:
    (published / file).unlink()
  else:
    (published / file).write_text(text)
  assert run(published) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_another_file_than_the_published_one_is_refused(published, capsys):
  (published / "out").mkdir()
  (published / "MetaMathQA-395K.json").rename(published / "out/MetaMathQA-395K.json")
  assert metamath.main([f"--out={published}/out", f"--gsm8k={published}"]) == 2
  assert "has 6 rows, the published file 395000" in capsys.readouterr().err
