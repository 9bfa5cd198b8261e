"""Fine-tuning a language model with an adapter.

  python launch.py --config=configs/llm.py:demo --workdir=runs/llm-demo
  python launch.py --config=configs/llm.py:pair --workdir=runs/llm-pair --sweep
  python launch.py --config=configs/llm.py:induction --workdir=runs/llm-induction --sweep

`model.weights` is a built-in name, a Hugging Face folder or hub id, or a .gguf file; `data.name`
is a built-in data set or a .jsonl file. `induction` compares six ways to use the instruction on
six tasks of instruction-induction; `deciding` is the two of them that have the instruction in the
prompt, at the seven learning rates of the protocol and with what the routing gains; `pair` is these
two on the word tasks, which need no download; `reasons` changes one thing at a time in the
Queryable LoRA of the deciding pair, and `combined` makes at once three changes that looked helpful
there, with the pair's search and seeds.

  python launch.py --config=configs/llm.py:deciding --workdir=runs/llm-deciding --sweep
  python launch.py --config=configs/llm.py:reasons --workdir=runs/llm-reasons --sweep
  python launch.py --config=configs/llm.py:combined --workdir=runs/llm-combined --sweep

The rule of `deciding`, written before its runs. "Queryable LoRA lowers the nats" is supported if
Student's 95 % interval of the paired difference to LoRA over the final seeds lies below zero, not
supported if it lies above. "The routing lowers the nats" is supported only if, besides, the
interval of `routing/gain_uniform` lies above zero. Where it does not, a difference or a tie says
nothing about routing; a tie counts as one between routing and no routing only where the gain is at
least 0.01 nats.

`all` is the deciding pair on the 24 tasks of instruction-induction, `gsm8k` LoRA and Queryable LoRA
on grade-school problems: reduced grids that two cores train in half an hour each. `all_grid` and
`gsm8k_grid`, for a GPU, have twelve learning rates and more steps.

  python launch.py --config=configs/llm.py:all --workdir=runs/llm-all --sweep
  python launch.py --config=configs/llm.py:gsm8k --workdir=runs/llm-gsm8k --sweep
  python launch.py --config=configs/llm.py:all_grid --workdir=runs/llm-all-grid --sweep
  python launch.py --config=configs/llm.py:gsm8k_grid --workdir=runs/llm-gsm8k-grid --sweep
"""

import ml_collections
import numpy as np
from ml_collections import config_dict

from configs import regression
from qlora_jax import sweeps
from qlora_jax.launching import options
from qlora_jax.parallel import mesh

VARIANTS = (
  "",
  "demo",
  "pair",
  "induction",
  "deciding",
  "reasons",
  "combined",
  "all",
  "all_grid",
  "gsm8k",
  "gsm8k_grid",
)
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
INDUCTION_RATES = (*LEARNING_RATES, 3e-2)  # without a prompt the best is 1e-2: one more above
# Two decades, close where `induction` left the optimum unresolved.
DECIDING_RATES = (3e-4, 1e-3, 3e-3, 5e-3, 7e-3, 1e-2, 3e-2)
GRID = tuple(float(f"{rate:.2g}") for rate in np.geomspace(1.1e-5, 6.3e-3, 12))  # for a GPU
DEMO_TASKS = (
  "first_letter",
  "last_letter",
  "plural",
  "uppercase",
  "number_to_words",
  "next_number",
)
INDUCTION_TASKS = (
  "antonyms",
  "singular_to_plural",
  "first_word_letter",
  "num_to_verbal",
  "translation_en-fr",
  "letters_list",
)

# One change each to the deciding Queryable LoRA, of the same number of parameters. The last four
# change how strongly and how early the router parts the tasks.
REASONS = {
  "lora": {"adapter.name": "lora"},
  "queryable_prior": {},
  "a layer a block": {"model.layers_per_block": 1},
  "one block of all layers": {"model.layers_per_block": 30},
  "rank 7, 3,500 atoms, top 4": {
    "adapter.rank": 7,
    "adapter.atoms": 3500,
    "adapter.top_k": 4,
  },
  "an operator a map": {"adapter.operator": "map"},
  "prior weight 4": {"adapter.prior_weight": 4.0},
  "prior temperature 0.25": {"adapter.prior_temperature": 0.25},
  "Gaussian atoms": {"adapter.atom_init": "gaussian"},
  "memory and router at 10 x the rate": {
    "optimizer.memory_multiplier": 10.0,
    "optimizer.router_multiplier": 10.0,
  },
}
COMBINED = ("a layer a block", "prior weight 4", "memory and router at 10 x the rate")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """SmolLM2-135M-Instruct on the built-in word tasks, or a variant: see the file's head."""
  arg = arg or ""
  sweeps.check_variant(arg, VARIANTS)
  config = ml_collections.ConfigDict()
  config.kind = "language"
  config.variant = arg
  config.seed = 0
  config.label = config_dict.placeholder(str)  # a setting's name in tables; its adapter's if none
  config.model = dict(
    weights="smollm2-135m-instruct",
    layers_per_block=5,
    base_dtype="float32",
    dtype="float32",
    remat="none",
    attention="auto",
  )
  config.model.adapted = config_dict.placeholder(tuple)
  config.adapter = regression.get_config().adapter
  config.adapter.name = "queryable_prior_query"
  config.adapter.budget = 2_450_000  # LoRA of rank 8 on all seven maps of SmolLM2-135M
  config.optimizer = dict(
    steps=600,
    batch_size=8,
    micro_batches=1,
    warmup=0.05,
    weight_decay=0.0,
    clip=1.0,
    memory_multiplier=1.0,
    router_multiplier=1.0,
  )
  config.optimizer.learning_rate = config_dict.placeholder(float)  # the adapter's own default
  config.data = dict(name="word_tasks", data_dir="data", length=256, pack=True, on_long="drop")
  config.data.manual_folder = config_dict.placeholder(str)
  config.data.system = config_dict.placeholder(str)  # the chat template's own unless given
  config.data.tasks = config_dict.placeholder(tuple)
  config.data.train_rows = config_dict.placeholder(int)
  config.instruction = dict(encoder="minilm", dim=32, in_prompt=False)
  # Controls: the vectors of all wordings change places, or the rows of a split exchange wordings.
  config.instruction.update(shuffled=False, exchanged=False)
  config.mesh = dict(slice=1, data=1, fsdp=-1, tensor=1, rules=mesh.DEFAULT_RULES)
  config.cluster = options.default()
  config.protocol = dict(search_seeds=(0,), final_seeds=(100, 101, 102))
  config.eval = dict(every=10, validation=100, examples=60, max_tokens=24, batch_size=32)
  # What the routing gains: validation examples per task (0 for none), and steps between two
  # measurements of the final runs (0 for the end alone).
  config.eval.update(routing=20, routing_every=0)
  config.checkpoint = dict(  # seconds: least time between two; validate_every: steps, 0 for never
    seconds=60.0, keep=2, keep_best=1, validate_every=0, on_nonfinite="end"
  )
  if arg in ("demo", "pair"):
    config.data.tasks = DEMO_TASKS
    config.data.length = 128
    config.data.system = ""  # two fifths fewer tokens than the template's own sentence
    config.optimizer.learning_rate = 3e-3
    config.optimizer.steps = 100
    config.optimizer.batch_size = 4
    config.eval.every = 2
    config.eval.examples = 8
    config.eval.max_tokens = 12
  if arg == "pair":
    config.optimizer.steps = 60
    config.eval.examples = 30
  if arg in ("induction", "deciding", "reasons", "combined"):
    config.data.name = "instruction_induction"
    config.data.tasks = INDUCTION_TASKS
    config.data.train_rows = 200
    config.data.length = 128
    config.data.system = ""
    config.optimizer.batch_size = 4
    config.optimizer.steps = 50
    config.eval.update(every=5, validation=40, examples=100, max_tokens=16, batch_size=50)
  if arg == "deciding":
    config.eval.routing_every = 10
  if arg in ("deciding", "reasons", "combined"):
    config.instruction.in_prompt = True
    config.adapter.name = "queryable_prior"
  if arg in ("all", "all_grid", "gsm8k", "gsm8k_grid"):
    math = arg.startswith("gsm8k")
    config.data.name = "gsm8k" if math else "instruction_induction"
    config.data.length = 256
    config.data.system = ""
    config.instruction.in_prompt = True
    config.optimizer.steps = 16 if math else 40
    config.eval.update(every=5, validation=40 if math else 8, examples=20 if math else 5)
    config.eval.update(max_tokens=128 if math else 24, batch_size=20)
    if arg.endswith("_grid"):
      config.optimizer.update(steps=500, batch_size=16)
      config.data.length = 512
      config.eval.update(every=10, validation=200 if math else 50, batch_size=100)
      config.eval.update(examples=1319 if math else 100, max_tokens=300 if math else 64)
    elif not math:
      config.data.train_rows = 50
      config.optimizer.batch_size = 2
  if arg == "reasons":  # at the rate that the search of `induction` chose, on one of its seeds
    config.optimizer.learning_rate = 3e-3
    config.protocol.final_seeds = (100,)
    config.eval.examples = 10
  return config


def get_hyper(hyper, arg: str | None = None) -> list[dict]:
  """Ways to use the instruction x learning rates; seeds: `protocol`.

  The pair that decides comes first.
  """
  if arg == "reasons":
    return [{"label": label, **changes} for label, changes in REASONS.items()]
  grid = INDUCTION_RATES if arg in ("induction", "combined") else LEARNING_RATES
  if arg == "deciding":
    grid = DECIDING_RATES
  if (arg or "").endswith("_grid"):
    grid = GRID
  rates = hyper.sweep("optimizer.learning_rate", grid)
  if arg in ("all", "all_grid", "gsm8k", "gsm8k_grid"):  # one task has nothing to route by a prior
    routed = "queryable" if arg.startswith("gsm8k") else "queryable_prior"
    return hyper.product(hyper.sweep("adapter.name", ("lora", routed)), rates)
  if arg == "combined":
    changes = {key: value for label in COMBINED for key, value in REASONS[label].items()}
    return hyper.product([{"label": "combined", **changes}], rates)
  deciding = (("lora", True, False), ("queryable_prior", True, False))
  others = (
    ("lora", False, False),
    ("queryable", False, False),
    ("queryable_prior", False, False),
    ("queryable_prior", False, True),
  )
  ways = deciding if arg in ("demo", "pair", "deciding") else deciding + others
  points = [
    {"adapter.name": name, "instruction.in_prompt": in_prompt, "instruction.shuffled": shuffled}
    for name, in_prompt, shuffled in ways
  ]
  return hyper.product(points, rates)
