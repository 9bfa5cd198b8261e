"""The three orders of contraction of (x A) C over ranks, atoms and top-k.

  PYTHONPATH=. python benchmarks/contraction.py

Prints microseconds for the seven adapted maps of one decoder layer's block, and the order that
`auto` picks. The physical limit is the multiply-adds counted in `qlora_jax/adapters/contraction.py`
at the machine's matrix-product rate, printed as `limit`.
"""

import statistics
import time

import jax
import numpy as np
from jax import numpy as jnp

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import contraction, functional

TOKENS, MAPS, REPEATS = 256, 7, 20


def seconds(function, *values) -> float:
  """Median seconds of a compiled call."""
  compiled, times = jax.jit(function), []
  for _ in range(REPEATS + 2):
    began = time.perf_counter()
    jax.block_until_ready(compiled(*values))
    times.append(time.perf_counter() - began)
  return statistics.median(times[2:])


def product_rate() -> float:
  """Multiply-adds a second of a large float32 matrix product on this machine."""
  side = 1024
  x = jnp.ones((side, side))
  return side**3 / seconds(jnp.matmul, x, x)


def block(config: config_lib.AdapterConfig, kind: str):
  """Weights and seven low-rank states to seven routed states, in the order `kind`."""

  def routed(low_rank, logits, atoms):
    weights = functional.sparse_weights(logits, config.kept_atoms)
    operator = functional.routed_operator(weights, atoms) if kind == "operator" else None
    fixed = config_lib.dataclasses.replace(config, contraction=kind)
    return [contraction.contract(fixed, MAPS, each, weights, operator, atoms) for each in low_rank]

  return routed


def main() -> None:
  rate, rng = product_rate(), np.random.default_rng(0)
  print(f"{TOKENS} tokens, {MAPS} maps; microseconds; {rate / 1e9:.0f} G multiply-adds a second")
  print("  R     M   k  operator   product    gather   limit  auto")
  for rank, atoms, top_k in (
    (8, 16, 0), (8, 16, 4), (16, 64, 0), (16, 64, 4), (16, 256, 4), (32, 64, 4),
  ):  # fmt: skip
    config = config_lib.AdapterConfig(rank=rank, atoms=atoms, top_k=top_k)
    low_rank = [rng.normal(size=(TOKENS, rank)).astype("f") for _ in range(MAPS)]
    logits = rng.normal(size=(TOKENS, atoms)).astype("f")
    memory = rng.normal(size=(atoms, rank, rank)).astype("f")
    kinds = ("operator", "product", "gather")
    times = [1e6 * seconds(block(config, kind), low_rank, logits, memory) for kind in kinds]
    work = min(
      atoms * rank**2 + MAPS * rank**2,
      MAPS * config.kept_atoms * rank**2,
    )
    cells = " ".join(f"{each:9.0f}" for each in times)
    limit = 1e6 * TOKENS * work / rate
    chosen = contraction.choose(config, MAPS)
    print(f"{rank:3d} {atoms:5d} {config.kept_atoms:3d} {cells} {limit:7.0f}  {chosen}")


if __name__ == "__main__":
  main()
