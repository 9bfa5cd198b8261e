"""User data files: three forms, and one-line messages that name file and line."""

import json
import re

import pytest

from qlora_jax import errors
from qlora_jax.data.text import pipeline

PLAIN = {"prompt": "2+2", "completion": "4"}


def _write(path, *lines):
  path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
  return path


def test_the_three_forms_are_read(tmp_path):
  messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
  ]
  path = _write(
    tmp_path / "train.jsonl",
    PLAIN,
    "",
    {"prompt": "capital of France", "completion": ["Paris", "paris"], "task": "capitals"},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Name a colour.", "output": "red"},
    {"messages": messages},
  )
  _write(tmp_path / "validation.jsonl", {"instruction": "Add.", "input": "4 4", "output": "8"})
  data = pipeline.load(str(path.parent))
  assert set(data.splits) == {"train", "validation"}
  train = sorted(data.splits["train"], key=lambda example: int(example.source.split()[-1]))
  assert [example.source for example in train] == [f"{path} line {n}" for n in (1, 3, 4, 5, 6)]
  assert [
    (example.instruction, example.prompt, example.answers, example.task) for example in train
  ] == [
    ("", "2+2", ("4",), "train"),
    ("", "capital of France", ("Paris", "paris"), "capitals"),
    ("Add.", "1 2", ("3",), "train"),
    ("Name a colour.", "", ("red",), "train"),
    ("Be brief.", "Hi", ("Hello.",), "train"),
  ]
  assert train[4].messages == tuple(messages) and train[0].messages is None
  assert data.instruction_texts == ("", "Add.", "Name a colour.", "Be brief.")
  for examples in data.splits.values():
    assert all(data.instruction_texts[o.paraphrase_id] == o.instruction for o in examples)


def test_a_file_alone_gives_a_tenth_to_validation_and_keeps_questions_together(tmp_path):
  rows = [{"prompt": f"q{i // 2}", "completion": str(i)} for i in range(60)]
  path = _write(tmp_path / "mine.jsonl", *rows)
  data, other = pipeline.load(str(path)), pipeline.load(str(path), seed=1)
  prompts = {split: {example.prompt for example in rows} for split, rows in data.splits.items()}
  assert len(prompts["validation"]) == 3 and len(data.splits["validation"]) == 6
  assert not prompts["train"] & prompts["validation"] and len(data.splits["train"]) == 54
  assert data.splits["validation"] == other.splits["validation"]
  assert data.splits["train"] != other.splits["train"]
  assert set(data.splits["train"]) == set(other.splits["train"])
  assert len(pipeline.load(str(path), train_rows=5).splits["train"]) == 5


def test_a_single_line_is_all_training(tmp_path):
  data = pipeline.load(str(_write(tmp_path / "one.jsonl", PLAIN)))
  assert set(data.splits) == {"train"} and len(data.splits["train"]) == 1


def test_a_byte_order_mark_and_line_separators_inside_a_text_are_no_mistake(tmp_path):
  path = tmp_path / "mine.jsonl"
  content = json.dumps({"prompt": "a\u2028b", "completion": "c"}, ensure_ascii=False)
  path.write_bytes(b"\xef\xbb\xbf" + content.encode() + b"\r\n" + content.encode() + b"\r\n")
  assert {example.prompt for example in pipeline.load(str(path)).splits["train"]} == {"a\u2028b"}


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "is not JSON"),
    ('[{"prompt": "a"},', "write one object per line"),
    ("3", "is a number, must be an object"),
    ({"prompt": "a"}, "has no field 'completion'; has: prompt"),
    ({"prompt": 3, "completion": "a"}, "'prompt' is a number, must be a text"),
    ({"prompt": "a", "completion": None}, "'completion' is null, must be a text"),
    ({"prompt": "a", "completion": " "}, "has no answer; 'completion' is empty"),
    ({"prompt": "a", "completion": []}, "has no answer; 'completion' is empty"),
    ({"prompt": "a", "completion": ["b", 1]}, "'completion' holds a number"),
    ({"instruction": "a", "input": "b"}, "has no field 'output'; has: instruction, input"),
    ({"instruction": "a", "input": None, "output": "b"}, "'input' is null"),
    ({"output": "b"}, "has no field 'instruction'"),
    ({"question": "a", "answer": "b"}, "needs prompt and completion, .*; has: question, answer"),
    ({}, "has: nothing"),
    ({"prompt": "a", "completion": "b", "task": 1}, "'task' is a number"),
    ({"messages": "hi"}, "'messages' must be a list of messages, is a text"),
    ({"messages": []}, "'messages' must be a list"),
    ({"messages": ["hi"]}, "message 1: is a text, must be an object"),
    ({"messages": [{"role": "user", "content": "a"}]}, "has no answer; the last message must be"),
    ({"messages": [{"role": "bot", "content": "a"}]}, "message 1: unknown role 'bot'; known: sys"),
    ({"messages": [{"role": "user"}]}, "message 1: has no field 'content'"),
    ({"messages": [{"role": "assistant", "content": ""}]}, "the assistant's answer is empty"),
  ],
)
def test_mistakes_name_file_and_line_in_one_line(tmp_path, line, message):
  path = _write(tmp_path / "mine.jsonl", PLAIN, "", line)
  with pytest.raises(errors.UserError, match=message) as caught:
    pipeline.load(str(path))
  assert str(caught.value).startswith(f"{path} line 3")
  assert "\n" not in str(caught.value)


def test_missing_empty_and_unreadable_files(tmp_path):
  with pytest.raises(errors.UserError, match=r"no file .*none.jsonl"):
    pipeline.load(str(tmp_path / "none.jsonl"))
  with pytest.raises(errors.UserError, match=r"empty.jsonl is empty"):
    pipeline.load(str(_write(tmp_path / "empty.jsonl", "", " ")))
  with pytest.raises(errors.UserError, match=re.escape(f"folder {tmp_path} has no file train")):
    pipeline.load(str(tmp_path))
  latin = tmp_path / "latin.jsonl"
  latin.write_bytes(json.dumps(PLAIN).encode() + b'\n{"prompt": "caf\xe9", "completion": "a"}')
  with pytest.raises(errors.UserError, match=r"latin.jsonl line 2: is not UTF-8"):
    pipeline.load(str(latin))
  with pytest.raises(errors.UserError, match="train_rows is 0"):
    pipeline.load(str(_write(tmp_path / "mine.jsonl", PLAIN)), train_rows=0)


def test_a_conversation_reaches_batches(tmp_path, tokenizer, render):
  turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
  path = _write(tmp_path / "mine.jsonl", {"messages": turns * 2}, PLAIN)
  examples = pipeline.load(str(path)).splits
  both = examples["train"] + examples["validation"]
  split = pipeline.encode(both, tokenizer, render, length=64, instruction_in_prompt=True)
  batch, index = next(pipeline.evaluation_batches(split, batch_size=2))
  answers = sorted(
    tokenizer.decode(batch.targets[row][batch.loss_mask[row] > 0]) for row in range(2)
  )
  assert answers == ["4<|im_end|>", "Hello.<|im_end|>Hello.<|im_end|>"]
  assert index.tolist() == [0, 1]
