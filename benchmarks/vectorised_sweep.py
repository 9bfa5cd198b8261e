"""A cohort of 70 trials as one program, against the same trials one by one in one process.

  python -m benchmarks.vectorised_sweep

Three sides, all including compilation: all trials as one program; one by one with one shared
program; and one by one with a new program per trial, as in a loop over a training function that
builds a jitted step (measured on 7 trials). The printed physical limit is the step's matrix
products at the machine's measured rate.
"""

import argparse
import time

import jax
import numpy as np
from jax import numpy as jnp

from qlora_jax.adapters import config as adapter_config
from qlora_jax.models import mlp
from qlora_jax.training import optimizer, step
from qlora_jax.workloads import cohort_program, regression_config

TRIALS, STEPS, CHUNK, BATCH, FEW = 70, 200, 100, 64, 7
SHAPE = mlp.MLPConfig(inputs=24, layers=4, layers_per_block=1)


def trials_per_minute(trials: int, cohort_size: int, shared: bool = True) -> float:
  """Trials per minute in cohorts, including compilation; `shared`: one program for all cohorts."""
  began = time.perf_counter()
  base = regression_config.random_base(SHAPE, 0)
  x = np.random.default_rng(0).normal(size=(1, CHUNK, BATCH, 24)).astype(np.float32)
  batches, row = step.Batch(x, x[..., 0], x[..., :1]), np.zeros(cohort_size, np.int32)
  program = None
  for first in range(0, trials, cohort_size):
    if program is None or not shared:
      adapter = adapter_config.AdapterConfig(family="lora", rank=8)
      config = optimizer.OptimizerConfig(steps=STEPS)
      program = cohort_program.Program(mlp.MLP(SHAPE, adapter), config)
    seeds = np.arange(first, first + cohort_size)
    states, frozen = program.init(base, seeds, np.full(cohort_size, 1e-3))
    for _ in range(STEPS // CHUNK):
      states, _ = program.train(states, frozen, batches, row)
    jax.block_until_ready(states)
  return 60 * trials / (time.perf_counter() - began)


def limit() -> float:
  """Trials per minute if a step were only the base's products, both ways, at the full rate."""
  side = 1024
  product = jax.jit(jnp.matmul)
  x = jnp.ones((side, side))
  jax.block_until_ready(product(x, x))
  began = time.perf_counter()
  for _ in range(20):
    jax.block_until_ready(product(x, x))
  rate = 20 * side**3 / (time.perf_counter() - began)
  weights = sum(leaf.size for leaf in jax.tree.leaves(regression_config.random_base(SHAPE, 0)))
  # Forward pass and gradient of the activations; a frozen weight needs no gradient.
  return 60 / (STEPS * 2 * weights * BATCH / rate)


def main() -> None:
  argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # no options
  together = trials_per_minute(TRIALS, TRIALS)
  one_by_one = trials_per_minute(TRIALS, 1)
  recompiled = trials_per_minute(FEW, 1, shared=False)
  print(f"{TRIALS} trials of {STEPS} steps; trials per minute (speed-up of one program)")
  print(f"all trials as one program            {together:6.0f}")
  print(f"one by one, one program for all      {one_by_one:6.0f}  ({together / one_by_one:.2f} x)")
  print(f"one by one, one program per trial    {recompiled:6.0f}  ({together / recompiled:.2f} x)")
  print(f"limit: the base's matrix products    {limit():6.0f}")


if __name__ == "__main__":
  main()
