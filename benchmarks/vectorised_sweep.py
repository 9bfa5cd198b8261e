"""A vectorised sweep of 70 points against the same points one by one in one process.

  python -m benchmarks.vectorised_sweep

Three sides, all starting uncompiled: all points as one program; one by one, sharing one compiled
program of one run; and one by one with a program of its own each, as a loop over a training
function that builds its own jitted step does (measured on 7 points). The physical limit printed is
that of the step's matrix products at the machine's measured rate.
"""

import argparse
import time

import jax
import numpy as np
from jax import numpy as jnp

from qlora_jax.adapters import config as adapter_config
from qlora_jax.models import mlp
from qlora_jax.training import optimizer, step
from qlora_jax.workloads import cohort_program as group
from qlora_jax.workloads import regression_config as settings

POINTS, STEPS, CHUNK, BATCH, FEW = 70, 200, 100, 64, 7
SHAPE = mlp.MLPConfig(inputs=24, layers=4, layers_per_block=1)


def points_a_minute(points: int, runs_at_once: int, shared: bool = True) -> float:
  """`points` in groups of `runs_at_once`, compilation included; `shared`: one program for all."""
  began = time.perf_counter()
  base = settings.random_base(SHAPE, 0)
  x = np.random.default_rng(0).normal(size=(1, CHUNK, BATCH, 24)).astype(np.float32)
  batches, row = step.Batch(x, x[..., 0], x[..., :1]), np.zeros(runs_at_once, np.int32)
  program = None
  for first in range(0, points, runs_at_once):
    if program is None or not shared:
      adapter = adapter_config.AdapterConfig(family="lora", rank=8)
      program = group.Program(mlp.MLP(SHAPE, adapter), optimizer.OptimizerConfig(steps=STEPS))
    seeds = np.arange(first, first + runs_at_once)
    states, frozen = program.init(base, seeds, np.full(runs_at_once, 1e-3))
    for _ in range(STEPS // CHUNK):
      states, _ = program.train(states, frozen, batches, row)
    jax.block_until_ready(states)
  return 60 * points / (time.perf_counter() - began)


def limit() -> float:
  """Points a minute if a step were its base's products, forward and backward, at full rate."""
  side = 1024
  product = jax.jit(jnp.matmul)
  x = jnp.ones((side, side))
  jax.block_until_ready(product(x, x))
  began = time.perf_counter()
  for _ in range(20):
    jax.block_until_ready(product(x, x))
  rate = 20 * side**3 / (time.perf_counter() - began)
  weights = sum(leaf.size for leaf in jax.tree.leaves(settings.random_base(SHAPE, 0)))
  # Forward and the gradient to the activations; a frozen weight needs no gradient of its own.
  return 60 / (STEPS * 2 * weights * BATCH / rate)


def main() -> None:
  argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # takes none
  together = points_a_minute(POINTS, POINTS)
  alone = points_a_minute(POINTS, 1)
  own = points_a_minute(FEW, 1, shared=False)
  print(f"{POINTS} points of {STEPS} steps, points a minute (all points as one program over it)")
  print(f"all points as one program            {together:6.0f}")
  print(f"one by one, one program for all      {alone:6.0f}  ({together / alone:.2f} x)")
  print(f"one by one, a program for each point {own:6.0f}  ({together / own:.2f} x)")
  print(f"limit: the base's matrix products    {limit():6.0f}")


if __name__ == "__main__":
  main()
