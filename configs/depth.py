"""Does the shared memory share structure across depth, and can a trained one be used again?

Trains networks, measures their routing, removes atoms from them, and moves their memory to other
tasks: `docs/studies/depth.md`. Units of work take 20 to 60 CPU seconds each and are resumable.

  python -m experiments depth --workdir=runs/depth
  python -m experiments depth --config=configs/depth.py:runlocal --workdir=runs/depth-local
"""

import ml_collections

from configs import regression
from qlora_jax import sweeps

VARIANTS = ("", "runlocal")
# Per setting: the task, the adapter, and the depth. At eight blocks rank and atoms are fixed, so
# that the memory has the size that the budget gives four blocks.
SETTINGS = (
  {"data.task": "regimes", "adapter.name": "queryable"},
  {"data.task": "multi_target", "adapter.name": "queryable_query"},
  {"data.task": "multi_target", "adapter.name": "queryable_prior"},
  {
    "data.task": "regimes",
    "adapter.name": "queryable",
    "model.layers": 8,
    "adapter.rank": 7,
    "adapter.atoms": 16,
  },
  {
    "data.task": "multi_target",
    "adapter.name": "queryable_query",
    "model.layers": 8,
    "adapter.rank": 7,
    "adapter.atoms": 16,
  },
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Four blocks, noise 0.5; `transfer.steps` are the steps on a new task."""
  arg = arg or ""
  sweeps.check_variant(arg, VARIANTS)
  config = regression.get_config()
  config.variant = arg
  config.transfer = dict(steps=500, adapter="queryable_query")
  config.baseline = dict(label_draws=10)  # how often the parts of the test rows are shuffled
  if arg == "runlocal":
    config.optimizer.steps, config.pretrain.steps, config.transfer.steps = 100, 300, 50
    config.baseline.label_draws = 2
    config.protocol = dict(search_seeds=(0,), final_seeds=(100, 101))
  return config


def get_hyper(hyper, arg: str | None = None) -> list[dict]:
  """The settings with their learning rates."""
  rates = (3e-3, 1e-2) if arg == "runlocal" else regression.LEARNING_RATES
  settings = SETTINGS[:2] if arg == "runlocal" else SETTINGS
  return hyper.product(list(settings), hyper.sweep("optimizer.learning_rate", rates))
