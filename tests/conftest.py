"""What tests share: compiled programs, prepared data, and a tiny model with its tokenizer."""

import atexit
import json
import os
import pathlib
import shutil
import tempfile

import pytest

# The processes that tests start inherit these variables: what one has compiled the others read. The
# folder is new in every test run, so that each program is compiled once in it. JAX is loaded here
# before they are set: this process keeps its own programs where a run keeps them.
_FOLDER = os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

# Compiling takes most of the suite's time, and a program with fewer optimizations compiles in half
# of it. `QLORA_JAX_TEST_OPTIMIZED=1` tests what users run.
if os.environ.get("QLORA_JAX_TEST_OPTIMIZED", "0") in ("", "0"):
  _FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false"
  )
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()

import jax  # noqa: E402, F401

from qlora_jax.training import compiled  # noqa: E402

if _FOLDER is None:
  _FOLDER = tempfile.mkdtemp(prefix="qlora_jax_compiled_")
  atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _FOLDER
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# `make test-fast` leaves these out: they compile or train much. New files count as fast.
SLOW = (
  "adapters/test_depth_scan.py",
  "adapters/test_new_adapter.py",
  "adapters/test_peft_parity.py",
  "adapters/test_properties.py",
  "adapters/test_references.py",
  "adapters/test_rerouting.py",
  "data/text/test_new_data_set.py",
  "experiments/",
  "launching/",
  "models/",
  "parallel/",
  "planning/",
  "test_docs.py",
  "test_launch.py",
  "test_mutants.py",
  "training/test_checkpoint.py",
  "training/test_frozen_groups.py",
  "training/test_killed.py",
  "training/test_language.py",
  "training/test_learning_rates.py",
  "training/test_study.py",
  "weights/test_load_memory.py",
  "weights/test_sources.py",
  "workloads/test_routing_gain.py",
)


def pytest_collection_modifyitems(items):
  folder = pathlib.Path(__file__).parent
  for item in items:
    if item.path.relative_to(folder).as_posix().startswith(SLOW):
      item.add_marker(pytest.mark.slow)


TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _few_programs():
  """A process that runs half of the suite compiles more programs than it may keep."""
  yield
  compiled.clear_if_needed(0.4)


def write_model(folder, seed):
  # Imported here: most tests need neither.
  import tokenizers
  import torch
  import transformers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  from qlora_jax.data.text import word_tasks

  folder.mkdir(parents=True)
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  examples = word_tasks.load().splits["train"][:500]
  backend.train_from_iterator(
    [f"{one.instruction}\n\n{one.prompt} {one.answers[0]} user assistant" for one in examples],
    trainers.BpeTrainer(
      vocab_size=500,
      special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
      }
    )
  )
  torch.manual_seed(seed)
  config = transformers.LlamaConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,  # logits that a small adapter can move
  )
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  return folder


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory):
  return tmp_path_factory.mktemp("shared_data")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
  return write_model(tmp_path_factory.mktemp("models") / "tiny", 0)


@pytest.fixture(scope="session")
def other_llama(tmp_path_factory):
  return write_model(tmp_path_factory.mktemp("models") / "other", 1)
