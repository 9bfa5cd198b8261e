"""User data: one JSON object per line, in one of three common forms.

    {"prompt": ..., "completion": ...}                     completion: a text or a list of texts
    {"instruction": ..., "input": ..., "output": ...}      Alpaca; 'input' may be missing or empty
    {"messages": [{"role": ..., "content": ...}, ...]}     ends with the assistant

A line can also have "task"; scores are reported per task, and the default is the file's name. The
first and the third form can have "instruction"; a conversation's default is its system message.
"""

import json
import pathlib
from typing import Any

from qlora_jax import errors
from qlora_jax.data.text import records

VALIDATION_SHARE = 0.1
SPLITS = ("train", "validation", "test")
ROLES = ("system", "user", "assistant")


def load(
  path: str | pathlib.Path, *, seed: int = 0, train_rows: int | None = None
) -> records.TextData:
  """Loads a file, or a folder with `train.jsonl`.

  The files `validation.jsonl` and `test.jsonl` of a folder are optional. Without a validation file,
  a tenth of the distinct questions becomes the validation split. It is the same for every seed, and
  absent if there is only one question.

  Args:
    path: file or folder.
    seed: draws the order of the training examples and the `train_rows` that are used.
    train_rows: maximum number of training examples; None for all.

  Returns:
    The existing splits. Each distinct instruction is one row of `instruction_texts`, including ""
    if an example has none. All instructions count as seen.

  Raises:
    UserError: a missing, empty or malformed file; the message names file and line.
  """
  path = pathlib.Path(path)
  if train_rows is not None and train_rows < 1:
    raise errors.UserError(f"train_rows is {train_rows}; it must be at least 1")
  texts: dict[str, int] = {}
  if path.is_dir():
    if not (path / "train.jsonl").is_file():
      raise errors.UserError(f"folder {path} has no file train.jsonl")
    files = {split: path / f"{split}.jsonl" for split in SPLITS}
    splits = {split: read(file, texts) for split, file in files.items() if file.is_file()}
  else:
    splits = {"train": read(path, texts)}
  if "validation" not in splits:
    splits["train"], validation = _take_validation(splits["train"])
    if validation:
      splits["validation"] = validation
  shuffled = records.stream("jsonl", "train", seed=seed).permutation(len(splits["train"]))
  splits["train"] = [splits["train"][i] for i in shuffled[:train_rows]]
  ids: dict[str, dict[int, None]] = {}
  for examples in splits.values():
    for example in examples:
      ids.setdefault(example.task, {})[example.paraphrase_id] = None
  return records.TextData(
    name=str(path),
    splits={split: tuple(splits[split]) for split in SPLITS if split in splits},
    instruction_texts=tuple(texts),
    seen_ids={task: tuple(sorted(task_ids)) for task, task_ids in ids.items()},
    heldout_ids={task: () for task in ids},
  )


def read(path: pathlib.Path, texts: dict[str, int]) -> list[records.Example]:
  """Reads one file; skips blank lines.

  Args:
    path: the file.
    texts: row number per instruction text; new instructions are added.

  Raises:
    UserError: see `load`.
  """
  try:
    content = path.read_text(encoding="utf-8-sig")
  except FileNotFoundError as error:
    raise errors.UserError(
      f"data.name: there is no file {path}; give a .jsonl file, a folder of them or a built-in name"
    ) from error
  except UnicodeDecodeError as error:
    line = error.object[: error.start].count(b"\n") + 1
    raise errors.UserError(f"{path} line {line}: is not UTF-8") from error
  except OSError as error:
    raise errors.UserError(f"data file {path} cannot be read ({error.strerror})") from error
  examples = []
  for number, line in enumerate(content.split("\n"), start=1):
    if line.strip():
      examples.append(_example(line, f"{path} line {number}", path.stem, texts))
  if not examples:
    raise errors.UserError(f"data file {path} is empty")
  return examples


def _example(line: str, source: str, task: str, texts: dict[str, int]) -> records.Example:
  try:
    fields = json.loads(line)
  except json.JSONDecodeError as error:
    hint = " (one JSON array? write one object per line)" if line.lstrip()[0] == "[" else ""
    raise errors.UserError(f"{source}: is not JSON: {error.msg}{hint}") from error
  if not isinstance(fields, dict):
    raise errors.UserError(f"{source}: is {_kind(fields)}, must be an object")
  task = _text(fields, "task", source, default=task)
  instruction = _text(fields, "instruction", source, default="")
  messages = None
  if "messages" in fields:
    messages = _messages(fields["messages"], source)
    system = [message["content"] for message in messages if message["role"] == "system"]
    instruction = instruction or "\n".join(system)
    # The last question; the prompt for the model is rendered from `messages`.
    prompt = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    answers = [messages[-1]["content"]]
  elif "prompt" in fields or "completion" in fields:
    prompt = _text(fields, "prompt", source)
    answers = _answers(fields, "completion", source)
  elif "instruction" in fields or "output" in fields:
    instruction = _text(fields, "instruction", source)
    prompt = _text(fields, "input", source, default="")
    answers = _answers(fields, "output", source)
  else:
    raise errors.UserError(
      f"{source}: needs prompt and completion, instruction and output, or messages; has: "
      f"{', '.join(fields) or 'nothing'}"
    )
  return records.Example(
    instruction=instruction,
    prompt=prompt,
    answers=tuple(answers),
    task=task,
    paraphrase_id=texts.setdefault(instruction, len(texts)),
    messages=messages,
    source=source,
  )


def _messages(value: Any, source: str) -> tuple[records.Message, ...]:
  if not isinstance(value, list) or not value:
    raise errors.UserError(f"{source}: 'messages' must be a list of messages, is {_kind(value)}")
  messages = []
  for number, message in enumerate(value, start=1):
    where = f"{source}, message {number}"
    if not isinstance(message, dict):
      raise errors.UserError(f"{where}: is {_kind(message)}, must be an object")
    role, content = _text(message, "role", where), _text(message, "content", where)
    if role not in ROLES:
      raise errors.UserError(f"{where}: unknown role {role!r}; known: {', '.join(ROLES)}")
    if role == "assistant" and not content.strip():
      raise errors.UserError(f"{where}: the assistant's answer is empty")
    messages.append({"role": role, "content": content})
  if messages[-1]["role"] != "assistant":
    raise errors.UserError(f"{source}: has no answer; the last message must be the assistant's")
  return tuple(messages)


def _answers(fields: dict[str, Any], field: str, source: str) -> list[str]:
  value = fields.get(field)
  answers = value if isinstance(value, list) else [_text(fields, field, source)]
  for answer in answers:
    if not isinstance(answer, str):
      raise errors.UserError(f"{source}: {field!r} holds {_kind(answer)}, must hold texts")
  if not answers or not all(answer.strip() for answer in answers):
    raise errors.UserError(f"{source}: has no answer; {field!r} is empty")
  return answers


def _text(fields: dict[str, Any], field: str, source: str, default: str | None = None) -> str:
  if field not in fields and default is not None:
    return default
  if field not in fields:
    raise errors.UserError(f"{source}: has no field {field!r}; has: {', '.join(fields)}")
  if not isinstance(fields[field], str):
    raise errors.UserError(f"{source}: {field!r} is {_kind(fields[field])}, must be a text")
  return fields[field]


def _take_validation(
  examples: list[records.Example],
) -> tuple[list[records.Example], list[records.Example]]:
  # The same division as for published data; rows with the same question stay together.
  rows = [
    records.Row("", f"{example.instruction}\n{example.prompt}", (str(i),))
    for i, example in enumerate(examples)
  ]
  parts = records.take_validation(rows, VALIDATION_SHARE, len(rows), "jsonl")
  train, validation = ([examples[int(row.answers[0])] for row in part] for part in parts)
  return train, validation


def _kind(value: Any) -> str:
  names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
  return "null" if value is None else names.get(type(value), "a number")
