"""PEFT's published setting: Llama-3.2-3B on MetaMathQA, scored on GSM8K.

`method_comparison/MetaMathQA` of huggingface/peft, the experiment `lora/llama-3.2-3B-rank32` with
`default_training_params.json`: LoRA of rank 32 and alpha 64 on the query and value maps (9,175,040
parameters), AdamW at 1e-4 with weight decay 0.1, 5000 steps of 4 examples of at most 768 tokens,
warm-up over a tenth and a cosine to zero, gradients clipped at 1, bfloat16. PEFT's result of
2025-06-19: exact match 48.2 % on the 1319 test problems, 30 minutes of training on one L40S. What
differs here is in docs/metamath.md.

  python -m qlora_jax.data.text.metamath --out=data/metamath
  python launch.py --config=configs/metamath.py --dry_run
  python launch.py --config=configs/metamath.py --config.model.weights=FOLDER \\
    --workdir=runs/metamath
  python launch.py --config=configs/metamath.py:grid --config.model.weights=FOLDER \\
    --workdir=runs/metamath-grid --sweep

`queryable` is Queryable LoRA of as many parameters in the same setting. `grid`, for a GPU, has both
at twelve learning rates from 1.1e-5 to 6.3e-3, chosen on validation, and three fresh seeds each.
"""

import ml_collections

from configs import llm
from qlora_jax import sweeps

VARIANTS = ("", "queryable", "grid")
LEARNING_RATES = llm.GRID
TEMPLATE = "Question: {prompt} Think step by step.\nAnswer:"


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """PEFT's LoRA, or a variant: see the file's head."""
  arg = arg or ""
  sweeps.check_variant(arg, VARIANTS)
  config = llm.get_config()
  config.variant = arg
  config.model.update(
    weights=None,
    layers_per_block=4,
    base_dtype="bfloat16",
    dtype="bfloat16",
    adapted=("q", "v"),
    remat="full",
  )
  config.model.architecture = "llama3.2-3b"
  config.adapter.update(
    name="queryable" if arg == "queryable" else "lora", budget=9_175_040, alpha=64.0
  )
  config.optimizer.update(
    learning_rate=1e-4, steps=5000, batch_size=4, warmup=0.1, weight_decay=0.1, clip=1.0
  )
  config.data.update(name="data/metamath", length=768, pack=False, on_long="truncate")
  config.data.template = TEMPLATE
  config.protocol = dict(search_seeds=(0,), final_seeds=(100, 101, 102))
  config.eval.update(every=10, validation=50, examples=1319, max_tokens=300, batch_size=50)
  config.checkpoint.validate_every = 250
  return config


def get_hyper(hyper, arg: str | None = None) -> list[dict]:
  """LoRA against Queryable LoRA: at PEFT's learning rate, or in `grid` at twelve."""
  rates = LEARNING_RATES if arg == "grid" else (1e-4,)
  return hyper.product(
    hyper.sweep("adapter.name", ("lora", "queryable")),
    hyper.sweep("optimizer.learning_rate", rates),
  )
