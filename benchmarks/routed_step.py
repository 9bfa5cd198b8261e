"""The routed step against the LoRA step at equal rank, for one trial and for a cohort of 21.

  python -m benchmarks.routed_step

Prints ratios, measured in one process; the times hold for this machine only. The physical limit is
the base's matrix products, which both sides have.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from qlora_jax.adapters import config as adapter_config
from qlora_jax.models import mlp
from qlora_jax.training import optimizer, step
from qlora_jax.workloads import cohort_program, regression_config

STEPS, BATCH, RANK, REPEATS = 50, 64, 8, 5


def seconds_per_step(adapter: adapter_config.AdapterConfig, trials: int) -> float:
  """Median seconds per step and trial, compiled, over `REPEATS` calls of `STEPS` steps."""
  shape = mlp.MLPConfig(inputs=24, layers=4, layers_per_block=1)
  config = optimizer.OptimizerConfig(steps=10_000)
  program = cohort_program.Program(mlp.MLP(shape, adapter), config)
  base = regression_config.random_base(shape, 0)
  states, frozen = program.init(base, np.arange(trials), np.full(trials, 1e-3))
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, STEPS, BATCH, 24)).astype(np.float32)
  batches = step.Batch(x, x[..., 0], x[..., :16])
  row, times = np.zeros(trials, np.int32), []
  for _ in range(REPEATS + 2):  # the first two compile
    began = time.perf_counter()
    states, metrics = program.train(states, frozen, batches, row)
    jax.block_until_ready((states, metrics))
    times.append(time.perf_counter() - began)
  return statistics.median(times[2:]) / STEPS / trials


def main() -> None:
  argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # no options
  plain = adapter_config.AdapterConfig(family="lora", rank=RANK)
  print("microseconds per step and trial (ratio to LoRA with the same number of trials)")
  for trials in (1, 21):
    reference = seconds_per_step(plain, trials)
    print(f"trials {trials:3d}  lora {1e6 * reference:8.0f}")
    for name, fields in {
      "queryable": {},
      "queryable, no summary": {"summary": "none"},
      "queryable, top 4": {"top_k": 4},
      "queryable, product": {"contraction": "product"},
    }.items():
      routed = seconds_per_step(adapter_config.AdapterConfig(rank=RANK, **fields), trials)
      print(f"trials {trials:3d}  {name} {1e6 * routed:8.0f}  ({routed / reference:.2f} x)")


if __name__ == "__main__":
  main()
