"""The two published data sets: parsing, splits, storage, download with checksums."""

import functools
import hashlib
import http.server
import json
import pathlib
import re
import shutil
import threading

import pytest

from qlora_jax import errors
from qlora_jax.data.text import (
  gsm8k,
  instruction_induction,
  instruction_induction_files,
  pipeline,
  published,
)

TASKS = instruction_induction.TASKS
# The published files; optional, in a folder beside the checkout.
PUBLISHED = pathlib.Path(__file__).parents[4] / "shared" / "data"
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published files")


@pytest.fixture
def server(tmp_path, monkeypatch):
  """A local server that serves tmp_path and records requests; replaces the published address."""
  requests = []

  class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      requests.append(self.path)

  handler = functools.partial(Handler, directory=str(tmp_path))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", requests
    running.shutdown()


def _induction(folder, data_dir, **settings):
  return pipeline.load("instruction_induction", manual_folder=folder, data_dir=data_dir, **settings)


def test_induction_keeps_the_published_splits_and_every_answer(induction_folder, tmp_path):
  data = _induction(induction_folder, tmp_path / "data")
  assert data.task_names == TASKS and len(TASKS) == 24
  prompts = {
    split: {(example.task, example.prompt) for example in examples}
    for split, examples in data.splits.items()
  }
  assert not prompts["train"] & prompts["validation"]
  assert prompts["test"] == prompts["test_seen"]
  # one of ten prompts is for validation (two of twenty, if both orders are asked)
  assert len(data.splits["train"]) == 23 * 9 + 18 and len(data.splits["validation"]) == 23 + 2
  assert len(data.splits["test"]) == 23 * 3 + 6
  assert all("c" in prompt or "e" in prompt for _, prompt in prompts["test"])
  answers = {(o.task, o.prompt): o.answers for split in data.splits.values() for o in split}
  assert answers["translation_en-de", "time e1"] == ("Zeit", "Mal")
  assert answers["word_in_context", "Word: e0"] == ("same", "yes", "true")
  assert answers["common_concept", "e0, roses, blood"] == ("are red.", "have a colour.")
  assert answers["rhymes", "pige0"] == ("big", "dig")  # not the word itself
  assert answers["cause_and_effect", "Sentence 1: Cause e2. Sentence 2: Effect 2."] == (
    "Cause e2.",
  )
  assert answers["cause_and_effect", "Sentence 1: Effect 2. Sentence 2: Cause e2."] == (
    "Cause e2.",
  )


def test_induction_wordings_are_split_into_seen_and_heldout(induction_folder, tmp_path):
  data = _induction(induction_folder, tmp_path / "data", seed=5, tasks=["sum", "diff"])
  texts = [[data.instruction_texts[i] for i in data.seen_ids[task]] for task in ("sum", "diff")]
  # "Do sum" and "do sum." are one wording; one of the remaining four is held out
  assert texts[0] == ["Do sum", "Perform sum", "Please sum"]
  assert [data.instruction_texts[i] for i in data.heldout_ids["diff"]] == ["Now diff"]
  assert {example.instruction for example in data.splits["test"]} == {"Now sum", "Now diff"}
  for split in ("train", "validation", "test_seen"):
    assert not {example.instruction for example in data.splits[split]} & {"Now sum", "Now diff"}


def test_induction_choice_of_tasks_cap_and_seed(induction_folder, tmp_path):
  data = _induction(induction_folder, tmp_path / "data", tasks=["sum", "rhymes"], train_rows=4)
  assert data.task_names == ("sum", "rhymes") and len(data.splits["train"]) == 8
  other = _induction(
    induction_folder, tmp_path / "data", tasks=["sum", "rhymes"], train_rows=4, seed=1
  )
  assert data.splits["test"] == other.splits["test"]
  assert data.splits["train"] != other.splits["train"]
  with pytest.raises(errors.UserError, match=r"unknown task 'sums'.*antonyms"):
    _induction(induction_folder, tmp_path / "data", tasks=["sums"])


def test_changed_files_are_never_mistaken_for_prepared_ones(gsm8k_folder, tmp_path):
  load = functools.partial(
    pipeline.load, "gsm8k", manual_folder=gsm8k_folder, data_dir=tmp_path / "data"
  )
  assert len(load().splits["test"]) == 4
  lines = (gsm8k_folder / "test.jsonl").read_text().splitlines()
  (gsm8k_folder / "test.jsonl").write_text("\n".join(lines[:3]))
  assert len(load().splits["test"]) == 3


@pytest.mark.parametrize(
  ("path", "content", "message"),
  [
    ("raw/induce/sum.json", "{", "raw/induce/sum.json: is not JSON"),
    ("raw/induce/sum.json", "[]", "raw/induce/sum.json: has no object 'examples'"),
    ("raw/execute/sum.json", '{"examples": {}}', "raw/execute/sum.json: has no examples"),
    (
      "raw/execute/sum.json",
      '{"examples": {"7": {"input": "1 2"}}}',
      "raw/execute/sum.json, example 7: field 'output' must be a text, is None",
    ),
    (
      "raw/induce/rhymes.json",
      '{"examples": {"7": {"input": "a", "output": "b", "other_rhymes": "c"}}}',
      "example 7: field 'other_rhymes' must be a list of texts",
    ),
    ("annotations/sum.json", '{"annotations": [1]}', "annotations/sum.json: field 'annotations'"),
    ("annotations/sum.json", None, "has no file annotations/sum.json"),
  ],
)
def test_malformed_files_are_named(induction_folder, tmp_path, path, content, message):
  if content is None:
    (induction_folder / path).unlink()
  else:
    (induction_folder / path).write_text(content)
  with pytest.raises(errors.UserError, match=re.escape(message)) as caught:
    _induction(induction_folder, tmp_path / "data")
  assert "\n" not in str(caught.value)


def test_gsm8k_solutions_lose_the_calculator_and_keep_the_number(gsm8k_folder, tmp_path):
  data = pipeline.load("gsm8k", manual_folder=gsm8k_folder, data_dir=tmp_path / "data")
  assert {split: len(rows) for split, rows in data.splits.items()} == {
    "train": 18,
    "validation": 2,
    "test": 4,
    "test_seen": 4,
  }
  example = data.splits["test"][2]
  assert example.prompt == "test: what is 2 plus 1000?"
  assert example.answers == ("It is 2+1000=1002.\n#### 1,002",)
  assert example.instruction in gsm8k.WORDINGS.heldout and example.source == "test.jsonl line 3"
  assert all("####" in text for text in data.instruction_texts)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("nonsense", "test.jsonl line 5: is not JSON"),
    ('{"question": "a"}', "test.jsonl line 5: needs the texts"),
    ("[]", "test.jsonl line 5: needs the texts"),
    ('{"question": "a", "answer": "7"}', "test.jsonl line 5: the answer has no number after"),
    ('{"question": "a", "answer": "#### x"}', "test.jsonl line 5: the answer has no number after"),
  ],
)
def test_gsm8k_mistakes_name_file_and_line(gsm8k_folder, tmp_path, line, message):
  with open(gsm8k_folder / "test.jsonl", "a") as file:
    file.write(line + "\n")
  with pytest.raises(errors.UserError, match=message):
    pipeline.load("gsm8k", manual_folder=gsm8k_folder, data_dir=tmp_path / "data")


def test_download_is_checked_and_kept(gsm8k_folder, tmp_path, monkeypatch, server):
  address, requests = server
  monkeypatch.setattr(gsm8k, "BASE", f"{address}/gsm8k")
  files = {
    name: hashlib.sha256((gsm8k_folder / name).read_bytes()).hexdigest() for name in gsm8k.FILES
  }
  monkeypatch.setattr(gsm8k, "FILES", files)
  load = functools.partial(pipeline.load, "gsm8k", data_dir=tmp_path / "data")
  data = load()
  assert len(data.splits["test"]) == 4 and len(requests) == 2
  assert load() == data and len(requests) == 2  # prepared already
  # a folder with the published content shares the prepared data
  assert load(manual_folder=gsm8k_folder) == data
  shutil.rmtree(tmp_path / "data" / "gsm8k")
  assert load() == data and len(requests) == 2  # prepared again from the downloaded files


def test_download_with_another_checksum_is_refused(gsm8k_folder, tmp_path, monkeypatch, server):
  monkeypatch.setattr(gsm8k, "BASE", f"{server[0]}/gsm8k")
  with pytest.raises(
    errors.UserError, match=r"train.jsonl has SHA-256 .*the download is discarded"
  ):
    pipeline.load("gsm8k", data_dir=tmp_path / "data")
  assert not list((tmp_path / "data").rglob("*train.jsonl*"))
  monkeypatch.setattr(gsm8k, "BASE", f"{server[0]}/elsewhere")
  with pytest.raises(errors.UserError, match=r"cannot download .*File not found.*manual_folder"):
    pipeline.load("gsm8k", data_dir=tmp_path / "data")


def test_addresses_are_pinned_to_a_commit():
  for module in (gsm8k, instruction_induction):
    assert re.fullmatch("[0-9a-f]{40}", module.COMMIT) and module.COMMIT in module.BASE
  files = {**gsm8k.FILES, **instruction_induction_files.FILES}
  assert len(files) == 74 and all(re.fullmatch("[0-9a-f]{64}", sha) for sha in files.values())


@needs_published
def test_published_gsm8k(tmp_path):
  folder = PUBLISHED / "gsm8k"
  assert published.config(gsm8k.FILES, folder).name == "published"
  data = pipeline.load("gsm8k", manual_folder=folder, data_dir=tmp_path)
  assert len(data.splits["train"]) + len(data.splits["validation"]) == 7473
  assert len(data.splits["test"]) == 1319
  assert not any("<<" in example.answers[0] for split in data.splits.values() for example in split)


@needs_published
def test_published_induction(tmp_path):
  folder = PUBLISHED / "instruction_induction"
  config = published.config(instruction_induction_files.FILES, folder)
  assert config.name == "published"
  data = _induction(folder, tmp_path)
  raw = {
    part: {
      task: json.loads((folder / "raw" / part / f"{task}.json").read_text())["examples"]
      for task in TASKS
    }
    for part in ("induce", "execute")
  }
  for task in TASKS:
    orders = 2 if task == "cause_and_effect" else 1
    counts = {
      split: sum(example.task == task for example in examples)
      for split, examples in data.splits.items()
    }
    assert counts["train"] + counts["validation"] == orders * len(raw["induce"][task])
    assert counts["test"] == counts["test_seen"] == orders * len(raw["execute"][task])
    assert counts["validation"] >= 1
  assert sum(len(e) for part in raw.values() for e in part.values()) == 69_818
  seen = {data.instruction_texts[i].casefold() for ids in data.seen_ids.values() for i in ids}
  heldout = {data.instruction_texts[i].casefold() for ids in data.heldout_ids.values() for i in ids}
  assert not seen & heldout
  assert all(
    example.answers and example.prompt for split in data.splits.values() for example in split
  )
