"""Fine-tuning a language model with an adapter.

  python launch.py --config=configs/llm.py:demo --workdir=runs/llm

`model.weights` is a built-in name, a Hugging Face folder or hub id, or a .gguf file.
"""

import ml_collections
from ml_collections import config_dict

from configs import regression
from qlora_jax import sweeps

VARIANTS = ("", "demo")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """SmolLM2-135M-Instruct on the built-in word tasks; `demo` is sized for two CPU cores."""
  arg = arg or ""
  sweeps.check_variant(arg, VARIANTS)
  config = ml_collections.ConfigDict()
  config.kind = "language"
  config.variant = arg
  config.seed = 0
  config.model = dict(
    weights="smollm2-135m-instruct", layers_per_block=5, base_dtype="float32", dtype="float32",
    remat="none",
  )  # fmt: skip
  config.model.adapted = config_dict.placeholder(tuple)
  config.adapter = regression.get_config().adapter
  config.adapter.name = "queryable_prior"
  config.adapter.budget = 1_000_000
  config.optimizer = dict(
    learning_rate=1e-3, steps=600, batch_size=8, warmup=0.05, weight_decay=0.0, clip=1.0,
    memory_multiplier=1.0, router_multiplier=1.0,
  )  # fmt: skip
  config.data = dict(name="word_tasks", data_dir="data", length=256, pack=True, on_long="drop")
  config.data.manual_folder = config_dict.placeholder(str)
  config.data.tasks = config_dict.placeholder(tuple)
  config.data.train_rows = config_dict.placeholder(int)
  config.instruction = dict(encoder="minilm", dim=32, in_prompt=False, shuffled=False)
  config.eval = dict(every=10, examples=50, max_tokens=24, batch_size=16)
  config.checkpoint = dict(seconds=60.0)
  if arg == "demo":
    config.optimizer.steps = 80
    config.optimizer.batch_size = 4
    config.eval.examples = 6
    config.eval.max_tokens = 12
  return config
