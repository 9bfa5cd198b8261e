"""Queryable LoRA against LoRA on six frozen networks per task, each with its own search.

The main study trains all methods on one frozen network per task. Its intervals are over the seeds
of the adapters' training, at the learning rate that one search chose: another network may favour
another rate, and another verdict. Here `pretrain.seed` gives that network and five others, on every
task of the study at its main level of noise.

The rule, written after the searched runs had been seen and before the routing gain was measured: a
difference is claimed where Student's 95 % interval of the mean
over the six networks excludes zero and Holm's p over the ten tasks is below 0.05. That routing is
the cause is claimed only where, besides, the intervals over networks of `routing/gain_mean` and
`routing/gain_uniform` lie above zero.

  python launch.py --config=configs/bases.py:runlocal --workdir=runs/local-bases --sweep
  python launch.py --config=configs/bases.py --workdir=runs/bases --sweep

`gain` trains the final trials of the routed method alone once more, on the tasks whose claims hold
over the networks and at the rates that their searches chose, for what the routing gains there: the
searched trials were made before that was measured.

  python launch.py --config=configs/bases.py:gain --workdir=runs/bases-gain --sweep

`python -m experiments bases --from=runs/bases` makes tables and figure.
"""

import ml_collections

from configs import regression
from qlora_jax import sweeps

SEEDS = (0, 1, 2, 3, 4, 5)  # of the frozen networks; the main study's is 0
PAIRS = {  # (routed method, its baseline) of each task
  task: ("queryable_prior", "lora_input") if task == "multi_target" else ("queryable", "lora")
  for task in (*regression.SYNTHETIC, *regression.TABLES)
}
# The rate that each network's search chose for the routed method; a test holds them against the
# committed results.
CHOSEN = {
  "regimes": (0.01, 0.02, 0.01, 0.01, 0.01, 0.01),
  "multi_target": (0.02, 0.01, 0.02, 0.01, 0.02, 0.02),
  "friedman1": (0.001, 0.001, 0.001, 0.001, 0.001, 0.002),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The main study's setting and its three search seeds; `runlocal` is small enough to look at."""
  arg = arg or ""
  sweeps.check_variant(arg, ("", "runlocal", "gain"))
  config = regression.get_config("" if arg == "gain" else arg)
  config.variant = arg
  if arg == "runlocal":
    config.protocol.update(search_seeds=(0,), final_seeds=(100, 101))
  return config


def label(method: str, seed: int) -> str:
  """A setting's name in tables."""
  return f"{method}/{seed}"


def get_hyper(hyper, arg: str | None = None) -> list[dict]:
  """Networks x tasks x methods x rates; real tables have no noise but their own."""
  if arg == "gain":
    return [
      {
        "pretrain.seed": seed,
        "data.task": task,
        "adapter.name": PAIRS[task][0],
        "label": label(PAIRS[task][0], seed),
        "optimizer.learning_rate": rate,
      }
      for task, rates in CHOSEN.items()
      for seed, rate in zip(SEEDS, rates, strict=True)
    ]
  seeds, tasks = (SEEDS[:2], ("regimes",)) if arg else (SEEDS, tuple(PAIRS))
  points = [
    {
      "pretrain.seed": seed,
      "data.task": task,
      "adapter.name": method,
      "label": label(method, seed),
      "data.noise_level": 0.0 if task in regression.TABLES else 0.5,
    }
    for seed in seeds
    for task in tasks
    for method in PAIRS[task][::-1]
  ]
  rates = (3e-3, 1e-2) if arg else regression.LEARNING_RATES
  return hyper.product(points, hyper.sweep("optimizer.learning_rate", rates))
