"""The three orders of contraction of (x A) C over ranks, atoms and top-k.

  python -m benchmarks.contraction

Prints microseconds of a gradient (forward and backward) for the seven adapted maps of a block of
one decoder layer, and the order that `auto` chooses. The column `limit` is the physical limit: the
minimum number of multiply-adds, those of the k atoms, at the machine's matrix-product rate.
"""

import argparse
import dataclasses
import itertools
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
  """Multiply-adds per second of a large float32 matrix product on this machine."""
  side = 1024
  x = jnp.ones((side, side))
  return side**3 / seconds(jnp.matmul, x, x)


def block(config: config_lib.AdapterConfig, kind: str):
  """The gradient function of seven routed states, in the order `kind`, as in a block's router."""
  fixed = dataclasses.replace(config, contraction=kind)

  def loss(low_rank, logits, atoms):
    weights = operator = None
    if kind == "gather" and config.kept_atoms < config.atoms:
      choice = functional.sparse_choice(logits, config.kept_atoms)
      operator = functional.gathered_operator(*choice, atoms)
    else:
      weights = functional.sparse_weights(logits, config.kept_atoms)
      operator = functional.routed_operator(weights, atoms) if kind == "operator" else None
    return sum(
      jnp.sum(jnp.sin(contraction.contract(fixed, MAPS, state, weights, operator, atoms)))
      for state in low_rank
    )

  return jax.grad(loss, argnums=(0, 1, 2))


def main() -> None:
  argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # no options
  rate, rng = product_rate(), np.random.default_rng(0)
  print(f"{TOKENS} tokens, {MAPS} maps; microseconds; {rate / 1e9:.0f} G multiply-adds per second")
  print("  R     M    k  operator   product    gather   limit  auto")
  for rank, (atoms, top_k) in itertools.product(
    (8, 16, 64), ((16, 0), (16, 4), (64, 0), (64, 4), (64, 8), (256, 4), (1024, 4), (4096, 4))
  ):
    config = config_lib.AdapterConfig(rank=rank, atoms=atoms, top_k=top_k)
    low_rank = [rng.normal(size=(TOKENS, rank)).astype("f") for _ in range(MAPS)]
    logits = rng.normal(size=(TOKENS, atoms)).astype("f")
    memory = rng.normal(size=(atoms, rank, rank)).astype("f")
    cells = []
    for kind in ("operator", "product", "gather"):
      if kind == "product" and atoms * rank > 2**14:  # one array [tokens, M, R] per map
        cells.append(f"{'-':>9s}")
        continue
      cells.append(f"{1e6 * seconds(block(config, kind), low_rank, logits, memory):9.0f}")
    # The backward pass has two products per product of the forward pass.
    work = 3 * min(atoms, config.kept_atoms) * rank**2 + 3 * MAPS * rank**2
    limit = 1e6 * TOKENS * work / rate
    chosen = contraction.choose(config, MAPS)
    print(
      f"{rank:3d} {atoms:5d} {config.kept_atoms:4d} {' '.join(cells)} {limit:7.0f}  {chosen}",
      flush=True,
    )


if __name__ == "__main__":
  main()
