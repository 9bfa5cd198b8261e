"""Ablations of the routing: one thing at a time is changed in Queryable LoRA.

On `regimes` the default is plain Queryable LoRA at rank 7, on `multi_target` it has the instruction
as prior and in the query, at rank 6; both have 8,192 parameters (2 %). The atoms fill that budget
again after each change, except where the table below gives their number. On eight layers, where
the size of a block has room to vary, the budget is 16,384.

  python launch.py --config=configs/ablations.py:runlocal --workdir=runs/local-ablations --sweep
  python launch.py --config=configs/ablations.py --workdir=runs/ablations --sweep

935 runs; the first 177 took 310 s of CPU time. `python -m experiments ablations` makes tables and
figure. Token against example routing is not here: an example of regression is one token.
"""

import ml_collections

from configs import regression

DEEP = {"model.layers": 8, "adapter.budget": 16_384}

DEFAULT = {
  "regimes": {"adapter.name": "queryable", "adapter.rank": 7, "adapter.atoms": 0},
  "multi_target": {
    "adapter.name": "queryable_prior_query",
    "adapter.rank": 6,
    "adapter.atoms": 0,
  },
}

# (factor, level): what it changes. In the order in which they are trained.
LEVELS = {
  "regimes": {
    ("default", ""): {},
    ("summary", "none"): {"adapter.summary": "none"},
    ("summary", "recurrent"): {"adapter.summary": "recurrent"},
    ("atoms kept", "1"): {"adapter.top_k": 1},
    ("atoms kept", "4"): {"adapter.top_k": 4},
    ("weights", "equal on 4"): {"adapter.top_k": 4, "adapter.weights": "equal"},
    ("query", "bias only"): {"adapter.query_state": False, "adapter.summary": "none"},
    ("query", "state only"): {"adapter.query_bias": False, "adapter.summary": "none"},
    ("query", "no state"): {"adapter.query_state": False},
    ("rank for atoms", "6"): {"adapter.rank": 6},
    ("memory", "a router a map, rank 6"): {"adapter.operator": "map", "adapter.rank": 6},
    ("memory", "a memory a map, rank 6"): {
      "adapter.operator": "map",
      "adapter.memory": "map",
      "adapter.rank": 6,
    },
    ("memory", "cores a map (CoMoL), rank 5"): {"adapter.name": "comol", "adapter.rank": 5},
    ("rank for atoms", "5"): {"adapter.rank": 5},
    ("rank for atoms", "4"): {"adapter.rank": 4},
    ("initial atoms", "Gaussian"): {"adapter.atom_init": "gaussian"},
    ("initial atoms", "orthogonal"): {"adapter.atom_init": "orthogonal"},
    ("epsilon", "0"): {"adapter.atom_noise": 0.0},
    ("epsilon", "1"): {"adapter.atom_noise": 1.0},
    ("temperature", "0.25"): {"adapter.temperature": 0.25},
    ("temperature", "4"): {"adapter.temperature": 4.0},
    ("atoms", "2"): {"adapter.atoms": 2},
    ("atoms", "32"): {"adapter.atoms": 32},
    ("load balance", "0.01"): {"adapter.load_balance_weight": 0.01},
    ("load balance", "0.1"): {"adapter.load_balance_weight": 0.1},
    ("key width", "2"): {"adapter.query_dim": 2},
    ("key width", "16"): {"adapter.query_dim": 16, "adapter.atoms": 9},
    ("rank", "3"): {"adapter.rank": 3, "adapter.atoms": 9},
    ("rank", "14"): {"adapter.rank": 14, "adapter.atoms": 9},
    ("atoms kept", "2"): {"adapter.top_k": 2},
    ("layers a block", "1 of 8"): DEEP,
    ("layers a block", "2 of 8"): {**DEEP, "model.layers_per_block": 2},
    ("layers a block", "4 of 8"): {**DEEP, "model.layers_per_block": 4},
    ("layers a block", "8 of 8"): {**DEEP, "model.layers_per_block": 8},
    ("layers a block", "1 of 8, no summary"): {**DEEP, "adapter.summary": "none"},
  },
  "multi_target": {
    ("default", ""): {},
    ("query", "instruction only"): {
      "adapter.query_state": False,
      "adapter.summary": "none",
      "adapter.query_bias": False,
    },
    ("query", "no instruction"): {"adapter.instruction_in_query": False},
    ("prior weight", "0"): {"adapter.prior_weight": 0.0},
    ("summary", "none"): {"adapter.summary": "none"},
    ("atoms kept", "1"): {"adapter.top_k": 1},
    ("atoms kept", "4"): {"adapter.top_k": 4},
    ("weights", "equal on 4"): {"adapter.top_k": 4, "adapter.weights": "equal"},
    ("rank for atoms", "5"): {"adapter.rank": 5},
    ("memory", "a memory a map, rank 5"): {
      "adapter.operator": "map",
      "adapter.memory": "map",
      "adapter.rank": 5,
    },
    ("memory", "cores a map (CoMoL), rank 5, input"): {
      "adapter.name": "comol",
      "adapter.rank": 5,
      "adapter.instruction_in_input": True,
    },
    ("initial atoms", "Gaussian"): {"adapter.atom_init": "gaussian"},
    ("epsilon", "1"): {"adapter.atom_noise": 1.0},
    ("prior weight", "4"): {"adapter.prior_weight": 4.0},
    ("prior temperature", "0.25"): {"adapter.prior_temperature": 0.25},
    ("prior temperature", "4"): {"adapter.prior_temperature": 4.0},
    ("load balance", "0.1"): {"adapter.load_balance_weight": 0.1},
    ("temperature", "0.25"): {"adapter.temperature": 0.25},
    ("memory", "a router a map, rank 5"): {"adapter.operator": "map", "adapter.rank": 5},
    ("summary", "recurrent"): {"adapter.summary": "recurrent"},
  },
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The base setting of the ablations; `runlocal` is small enough to look at."""
  return regression.of_study(arg)


def get_hyper(hyper, arg: str | None = None) -> list[dict]:
  """The levels of both tasks in turn, times the rates; `runlocal` has the first three of each."""
  levels = {
    task: [
      {"data.task": task, "label": label(factor, level), **DEFAULT[task], **changes}
      for (factor, level), changes in own.items()
    ][: 3 if arg else None]
    for task, own in LEVELS.items()
  }
  first, second = levels.values()
  points = [point for pair in zip(first, second, strict=False) for point in pair]
  points += first[len(second) :]
  rates = (3e-3, 1e-2) if arg else regression.LEARNING_RATES
  return hyper.product(points, hyper.sweep("optimizer.learning_rate", rates))


def label(factor: str, level: str) -> str:
  """The name of a level in tables."""
  return f"{factor}={level}" if level else factor
