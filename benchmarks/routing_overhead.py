"""A decoder's training step with Queryable LoRA against LoRA of the same rank, over M, k and R.

  python -m benchmarks.routing_overhead [--out=FILE.csv]
  python -m benchmarks.routing_overhead --layers=2 --rows=1 --length=32 --repeats=1 \
    --atoms=16 --kept=2 --ranks=8        # a check of one minute

The decoder has SmolLM2-135M's shape (30 layers, or fewer with --layers) and random weights, because
the time of a step does not depend on the weights. Both sides of a ratio are measured in one
process, one step of each in turn. The output has the median ratio of the pairs and the analytic
ratio, which counts FLOPs. The difference is work outside matrix products: softmax, top-k, gathers
and memory.
"""

import argparse
import csv
import itertools
import pathlib
import statistics
import time

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import config as adapter_config
from qlora_jax.adapters import contraction
from qlora_jax.models import decoder
from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.planning import flops
from qlora_jax.training import optimizer as optimizer_lib
from qlora_jax.workloads import language_shards, language_step

ATOMS, KEPT, RANKS = (16, 64, 256, 1024, 4096), (2, 4, 8, 0), (8, 16, 64)


def shape_of(layers: int) -> decoder.DecoderConfig:
  """SmolLM2-135M's shape with one layer per block, so one router per layer."""
  return decoder.DecoderConfig(
    vocabulary=49_152,
    width=576,
    hidden=1536,
    layers=layers,
    heads=9,
    groups=3,
    head_dim=64,
    tied=True,
    max_length=8192,
  )


class Step:
  """The step of training, compiled, with its state."""

  def __init__(self, shape, adapter, base, rows: int, length: int):
    model = decoder.Decoder(shape, adapter)
    optimizer = optimizer_lib.OptimizerConfig(batch_size=rows)
    shards = language_shards.Shards(mesh_lib.make(mesh_lib.MeshConfig(), jax.devices()[:1]))
    self.state, self.frozen = shards.draw(model, base, optimizer, 1e-4, 0)
    self.update = language_shards.update(model, optimizer, shards)
    self.batch = batch(shape, rows, length)

  def seconds(self) -> float:
    """Runs one step and returns its seconds."""
    began = time.perf_counter()
    self.state, values = self.update(self.state, self.frozen, self.batch)
    jax.block_until_ready((self.state, values))
    return time.perf_counter() - began


def batch(shape: decoder.DecoderConfig, rows: int, length: int) -> language_step.LanguageBatch:
  """Random tokens, one text per row, with a loss at every token."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, shape.vocabulary, (rows, length), dtype=np.int32)
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  ones, count = np.ones_like(tokens), language_step.CHUNK
  while count < rows * length:
    count *= 2
  places = np.zeros((1, count), np.int32)
  weights = np.zeros((1, count), np.float32)
  places[0, : rows * length], weights[0, : rows * length] = np.arange(rows * length), 1.0
  targets = tokens.reshape(-1)[places]
  drawn = language_step.LanguageBatch(
    tokens, positions, ones, ones.astype(np.float32), None, places, targets, weights
  )
  return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], drawn)


def ratio(first: Step, second: Step, repeats: int) -> tuple[float, float]:
  """(median of second / first over pairs of steps, median seconds of the first)."""
  pairs = []
  for turn in range(repeats + 1):  # the first turn compiles
    order = (first, second) if turn % 2 else (second, first)
    times = {id(step): step.seconds() for step in order}
    if turn:
      pairs.append((times[id(first)], times[id(second)]))
  return statistics.median(b / a for a, b in pairs), statistics.median(a for a, _ in pairs)


def points(options) -> list[tuple[int, int, int]]:
  """(rank, atoms, kept atoms) of every measurement; 0 kept atoms means all."""
  return [
    (rank, atoms, kept)
    for rank, atoms, kept in itertools.product(options.ranks, options.atoms, options.kept)
    if kept < atoms
  ]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--layers", type=int, default=30)
  parser.add_argument("--rows", type=int, default=4)
  parser.add_argument("--length", type=int, default=128)
  parser.add_argument("--repeats", type=int, default=5)
  for name, values in (("atoms", ATOMS), ("kept", KEPT), ("ranks", RANKS)):
    parser.add_argument(
      f"--{name}", type=lambda text: [int(number) for number in text.split(",")], default=values
    )
  parser.add_argument("--out", type=pathlib.Path, help="CSV; its points are not measured again")
  options = parser.parse_args()
  shape = shape_of(options.layers)
  none = adapter_config.AdapterConfig(family="none")
  drawn = decoder.Decoder(shape, none).init(
    jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method="initialise"
  )
  base, tokens = nn.meta.unbox(drawn["base"]), options.rows * options.length
  done = set()
  if options.out and options.out.exists():
    with options.out.open() as file:
      done = {(int(r["rank"]), int(r["atoms"]), int(r["kept"])) for r in csv.DictReader(file)}
  print(
    f"{jax.devices()[0].device_kind}: {options.layers} layers, {options.rows} x {options.length}"
  )
  print("  R     M    k  order     LoRA, s  measured  analytic")
  plain: dict[int, Step] = {}
  for rank, atoms, kept in points(options):
    if (rank, atoms, kept) in done:
      continue
    if rank not in plain:
      plain.clear()
      lora_adapter = adapter_config.AdapterConfig(family="lora", rank=rank)
      plain[rank] = Step(shape, lora_adapter, base, options.rows, options.length)
    adapter = adapter_config.AdapterConfig(rank=rank, atoms=atoms, top_k=kept)
    routed = Step(shape, adapter, base, options.rows, options.length)
    measured, seconds = ratio(plain[rank], routed, options.repeats)
    lora_flops, routed_flops = (
      flops.step(shape, config, options.rows, options.length, tokens).hardware
      for config in (adapter_config.AdapterConfig(family="lora", rank=rank), adapter)
    )
    order = contraction.choose(adapter, len(shape.adapted))
    print(
      f"{rank:3d} {atoms:5d} {kept or 'M':>4}  {order:9s} {seconds:7.3f}"
      f"  {measured:7.3f}x {routed_flops / lora_flops:8.4f}x",
      flush=True,
    )
    if options.out:
      new = not options.out.exists()
      with options.out.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
          writer.writerow(("rank", "atoms", "kept", "order", "lora_seconds", "ratio", "analytic"))
        writer.writerow((rank, atoms, kept, order, seconds, measured, routed_flops / lora_flops))


if __name__ == "__main__":
  main()
