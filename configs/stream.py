"""A stream of tasks: what is forgotten, what carries over, and whether frozen atoms help.

The parts of a task (targets that differ by the instruction, regions of the input) arrive one after
another, in an order per seed; `docs/studies/stream.md` has the definitions.

  python -m experiments stream --workdir=runs/stream
  python -m experiments stream --config=configs/stream.py:runlocal --workdir=runs/stream-local
"""

import ml_collections

from configs import regression
from qlora_jax import sweeps

VARIANTS = ("", "runlocal")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Four blocks, noise 0.5; `stream.steps` are the steps on each part."""
  arg = arg or ""
  sweeps.check_variant(arg, VARIANTS)
  config = regression.get_config()
  config.variant = arg
  config.stream = dict(steps=200)
  if arg == "runlocal":
    config.stream.steps, config.pretrain.steps = 20, 300
    config.protocol = dict(search_seeds=(0,), final_seeds=(100, 101))
  return config


def get_hyper(hyper, arg: str | None = None) -> list[dict]:
  """The tasks with their learning rates."""
  rates = (3e-3, 1e-2) if arg == "runlocal" else regression.LEARNING_RATES
  return hyper.product(
    hyper.sweep("data.task", ("multi_target", "regimes")),
    hyper.sweep("optimizer.learning_rate", rates),
  )
