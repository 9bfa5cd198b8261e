"""A vectorised sweep of 70 points against the same points one by one in one process.

  PYTHONPATH=. python benchmarks/vectorised_sweep.py

Both sides start uncompiled. The points one by one share one compiled program of one run.
"""

import time

import jax
import numpy as np

from qlora_jax.adapters import config as adapter_config
from qlora_jax.models import mlp
from qlora_jax.training import group, optimizer, settings, step

POINTS, STEPS, CHUNK, BATCH = 70, 200, 100, 64


def minutes(runs_at_once: int) -> float:
  """Minutes for all points in groups of `runs_at_once`, compilation included."""
  began = time.perf_counter()
  shape = mlp.MLPConfig(inputs=24, layers=4, layers_per_block=1)
  adapter = adapter_config.AdapterConfig(method="lora", rank=8)
  program = group.Program(mlp.MLP(shape, adapter), optimizer.OptimizerConfig(steps=STEPS))
  base = settings.random_base(shape, 0)
  x = np.random.default_rng(0).normal(size=(1, CHUNK, BATCH, 24)).astype(np.float32)
  batches, row = step.Batch(x, x[..., 0], x[..., :1]), np.zeros(runs_at_once, np.int32)
  for first in range(0, POINTS, runs_at_once):
    seeds = np.arange(first, first + runs_at_once)
    states, frozen = program.init(base, seeds, np.full(runs_at_once, 1e-3))
    for _ in range(STEPS // CHUNK):
      states, _ = program.train(states, frozen, batches, row)
    jax.block_until_ready(states)
  return (time.perf_counter() - began) / 60


def main() -> None:
  together, alone = minutes(POINTS), minutes(1)
  print(f"{POINTS} points of {STEPS} steps: together {POINTS / together:.0f} points a minute")
  print(f"one by one {POINTS / alone:.0f} points a minute; ratio {alone / together:.2f} x")


if __name__ == "__main__":
  main()
