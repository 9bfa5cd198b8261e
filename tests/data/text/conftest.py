"""A small real tokenizer, its chat template, and files in the published formats."""

import dataclasses
import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from qlora_jax.data.text import instruction_induction_files, word_tasks


@dataclasses.dataclass(frozen=True)
class SmallTokenizer:
  """A byte-level BPE with the attributes of `formatting.Tokenizer`."""

  backend: tokenizers.Tokenizer
  pad_id: int = 0
  bos_id: int = 1
  eos_id: int = 2

  def encode(self, text, add_special_tokens=False):
    return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

  def decode(self, ids):
    return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)


@pytest.fixture(scope="session")
def tokenizer():
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  examples = word_tasks.load().splits["train"][:500]
  backend.train_from_iterator(
    [
      f"{example.instruction}\n\n{example.prompt} {example.answers[0]} user assistant"
      for example in examples
    ],
    trainers.BpeTrainer(
      vocab_size=500,
      special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  return SmallTokenizer(backend)


@pytest.fixture(scope="session")
def render():
  """A renderer for ChatML."""

  def chat(messages, add_generation_prompt):
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")

  return chat


@pytest.fixture
def induction_folder(tmp_path):
  """Files in the published format of Instruction Induction, a few rows per task."""
  special = {
    "cause_and_effect": lambda i, part: {"cause": f"Cause {part}{i}.", "effect": f"Effect {i}."},
    "common_concept": lambda i, part: {
      "concept": "are red.",
      "items": [f"{part}{i}", "roses", "blood"],
      "all_common_concepts": ["are red.", "have a colour."],
    },
    "rhymes": lambda i, part: {
      "input": f"pig{part}{i}",
      "output": "big",
      "other_rhymes": ["big", f"pig{part}{i}", "dig"],
    },
    "word_in_context": lambda i, part: {
      "input": f"Word: {part}{i}",
      "output": "same",
      "possible_outputs": ["same", "yes", "true"],
    },
  }
  for language in ("de", "es", "fr"):
    special[f"translation_en-{language}"] = lambda i, part: {
      "input": f"time {part}{i}",
      "output": "Zeit",
      "possible_translations": ["Mal", "Zeit"],
    }
  folder = tmp_path / "induction"
  for task in instruction_induction_files.TASKS:
    make = special.get(task, lambda i, part: {"input": f"in {part}{i}", "output": f"out {i}"})
    for part, number in (("raw/induce", 10), ("raw/execute", 3)):
      examples = {str(i + 1): make(i, part[4]) for i in range(number)}
      content = {"metadata": {"num_examples": number}, "examples": examples}
      _write(folder / part / f"{task}.json", content)
    texts = [f"Do {task}", f"do {task}.", f"Perform {task}", f"Please {task}", f"Now {task}"]
    _write(folder / "annotations" / f"{task}.json", {"annotations": texts})
  return folder


@pytest.fixture
def gsm8k_folder(tmp_path):
  """Files in the published format of GSM8K."""
  folder = tmp_path / "gsm8k"
  folder.mkdir()
  for split, number in (("train", 20), ("test", 4)):
    lines = [
      json.dumps(
        {
          "question": f"{split}: what is {i} plus 1000?",
          "answer": f"It is {i}+1000=<<{i}+1000={i + 1000}>>{i + 1000}.\n#### {i + 1000:,}",
        }
      )
      for i in range(number)
    ]
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
  return folder


def _write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))
