"""Fine-tuning large decoders on TPU pods, and planning it on a machine without TPUs.

  python launch.py --plan --config=configs/llama.py:size=70b --topology=v5p:4x4x4
  python launch.py --plan --config=configs/llama.py:size=405b,rows=128 --topology=v5p:8x8x8 \\
    --slices=2
  python launch.py --plan --config=configs/llama.py:size=gemma3-27b,length=8192 --topology=v6e:8x8

To train, give the weights and the data of the same config:

  python launch.py --config=configs/llama.py:size=8b --config.model.weights=FOLDER
    --config.data.name=FILE.jsonl --workdir=runs/llama-8b

Arguments: `size`, `rows` (of the whole batch) and `length` (tokens a row).
"""

import ml_collections
from ml_collections import config_dict

from configs import llm
from qlora_jax import errors

# Size: (architecture, layers a block, fsdp, tensor); -1 takes the chips that are left. One layer a
# block compiles fastest; Gemma's layers alternate between two kinds of attention.
SIZES = {
  "8b": ("llama3-8b", 1, -1, 1),
  "70b": ("llama3-70b", 1, -1, 4),
  "405b": ("llama3-405b", 1, -1, 8),
  "qwen3-8b": ("qwen3-8b", 1, -1, 1),
  "qwen3-32b": ("qwen3-32b", 1, -1, 4),
  "gemma2-27b": ("gemma2-27b", 2, -1, 4),
  "gemma3-27b": ("gemma3-27b", 2, -1, 4),
}
LEARNING_RATES = (1e-4, 3e-4, 1e-3)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Queryable LoRA with M = 64, k = 4, R = 16 on all maps of a model; `size=8b` by default."""
  given = _arguments(arg or "")
  architecture, layers_per_block, fsdp, tensor = SIZES[given["size"]]
  config = llm.get_config()
  config.variant = arg or ""
  config.model.update(
    layers_per_block=layers_per_block, base_dtype="bfloat16", dtype="bfloat16", remat="full"
  )
  config.model.weights = config_dict.placeholder(str)
  config.model.architecture = architecture
  config.adapter.update(name="queryable", rank=16, atoms=64, top_k=4)
  config.optimizer.update(learning_rate=3e-4, batch_size=given["rows"], steps=1000)
  config.data.length = given["length"]
  config.mesh.update(fsdp=fsdp, tensor=tensor)
  config.instruction.in_prompt = True
  config.eval.update(every=10, batch_size=given["rows"])
  return config


def get_hyper(hyper, arg: str | None = None) -> list[dict]:
  """LoRA of the same rank against Queryable LoRA, three learning rates each."""
  del arg
  return hyper.product(
    hyper.sweep("adapter.name", ("lora", "queryable")),
    hyper.sweep("optimizer.learning_rate", LEARNING_RATES),
  )


def _arguments(arg: str) -> dict:
  """size=70b,rows=64,length=4096 as a dict, with defaults for what is not given."""
  found = {"size": "8b", "rows": "64", "length": "4096"}
  for part in filter(None, arg.split(",")):
    name, _, value = part.partition("=")
    if name not in found:
      raise errors.UserError(
        f"--config: unknown argument {part!r}; use size=..., rows=..., length=..."
      )
    found[name] = value
  if found["size"] not in SIZES:
    raise errors.UserError(
      f"--config: size {found['size']!r} is unknown; use one of {', '.join(SIZES)}"
    )
  for name in ("rows", "length"):
    if not found[name].isdigit() or not int(found[name]):
      raise errors.UserError(f"--config: {name}={found[name]!r} is not a number of at least 1")
    found[name] = int(found[name])
  return found
