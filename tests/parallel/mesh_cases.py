"""Runs a train step of each model on each mesh of eight CPU devices; writes arrays and facts.

It needs a separate process, because the number of devices is fixed when JAX starts.

  python tests/parallel/mesh_cases.py OUT.npz OUT.json [CASE ...]
"""

import json
import os
import pathlib
import re
import sys

os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8"
  # Compilation takes most of the time, and the checks do not depend on optimisation.
  " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import config as adapter_config
from qlora_jax.data.text import packing
from qlora_jax.models import decoder, generation, mlp
from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.parallel import sharding
from qlora_jax.training import optimizer as optimizer_lib
from qlora_jax.training import step as step_lib
from qlora_jax.workloads import language_shards, language_step

BLOCKS = 3  # no other axis has this length, so that it is recognisable in compiled programs
MESHES = {
  "one": {"data": 1, "fsdp": 1, "tensor": 1},
  "data": {"data": 8, "fsdp": 1},
  "fsdp": {"fsdp": 8},
  "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
  # The atoms of the memory are split.
  "atoms": {"fsdp": 4, "tensor": 2, "rules": (*mesh_lib.DEFAULT_RULES, ("atoms", "tensor"))},
}
ADAPTERS = {
  "lora": {"family": "lora", "rank": 4},
  "queryable": {"rank": 4, "atoms": 8, "top_k": 2, "query_dim": 8, "load_balance_weight": 0.01},
}
OPTIMIZER = optimizer_lib.OptimizerConfig(steps=4, batch_size=16, warmup=0.25)
ROWS, LENGTH = 16, 10
ONLY = {"generation": ("queryable/one", "queryable/mixed")}  # other kinds run on all meshes
COLLECTIVE = re.compile(
  r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collectives(text: str) -> list[tuple[str, str, bool]]:
  """(kind, shape, whether it is in a loop) of each array that a compiled program moves."""
  bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
  moved, inside = [], False
  for line in text.splitlines():
    if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
      inside = header[1] in bodies
    if matched := COLLECTIVE.search(line):
      moved += [
        (matched[2], shape, inside) for shape in re.findall(r"[a-z]+\d*\[[\d,]*\]", matched[1])
      ]
  return moved


def disturbed(params):
  """Adds noise to the adapter, so that no factor is zero and every gradient has an effect."""
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype("f"), params)


def run(model, variables, boxed, batch, shards, gradients):
  """((loss, gradients, parameters after two steps), compiled text, local bytes) on one mesh."""
  placed = jax.tree.map(jax.device_put, variables, sharding.tree(shards.mesh, shards.rules, boxed))
  tx = optimizer_lib.make(OPTIMIZER)
  trained = sharding.tree(shards.mesh, shards.rules, boxed)["params"]
  state_shardings = sharding.optimizer(
    tx, jax.eval_shape(tx.init, variables["params"]), trained, shards.mesh
  )
  replicated = shards.replicated
  state = step_lib.TrainState(
    jnp.zeros((), jnp.int32),
    placed["params"],
    jax.jit(tx.init, out_shardings=state_shardings)(placed["params"]),
    jnp.float32(0.05),
  )
  frozen = step_lib.Frozen(placed["base"], {})

  def step(state, frozen, batch):
    loss_and_grads = gradients(state.params, frozen, batch, model)
    state, _ = step_lib.train_step(state, frozen, batch, model, tx, lambda *_: loss_and_grads)
    return state, loss_and_grads

  with shards.use():
    compiled = (
      jax.jit(
        step,
        out_shardings=(
          step_lib.TrainState(replicated, trained, state_shardings, replicated),
          None,
        ),
      )
      .lower(state, frozen, batch)
      .compile()
    )
    state, (loss, grads) = compiled(state, frozen, batch)
    state, _ = compiled(state, frozen, batch)
  local = {
    "adapter": sum(
      leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params)
    ),
    "moments": sum(
      leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.opt_state)
    ),
    "base": sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed["base"])),
  }
  return (loss, grads, state.params), compiled.as_text(), local


def tiny_decoder(adapter):
  """(model, boxed shapes, variables)."""
  config = decoder.DecoderConfig(
    vocabulary=64, width=16, hidden=32, layers=BLOCKS, heads=4, groups=2, head_dim=8
  )
  model = decoder.Decoder(config, adapter_config.AdapterConfig(**ADAPTERS[adapter]))
  init = jax.jit(
    lambda key: nn.meta.unbox(model.init(key, jnp.zeros((1, 2), jnp.int32), method="initialise"))
  )
  variables = jax.tree.map(np.asarray, init(jax.random.key(0)))
  variables["params"] = disturbed(variables["params"])
  return model, decoder.abstract(config, model.adapter), variables


def decoder_case(adapter, shards):
  model, boxed, variables = tiny_decoder(adapter)
  rng = np.random.default_rng(2)
  shape = (ROWS, LENGTH)
  segments = np.repeat([[1] * 6 + [2] * 3 + [0]], ROWS, axis=0).astype(np.int32)
  positions = np.repeat([[*range(6), *range(3), 0]], ROWS, axis=0).astype(np.int32)
  # The number of answers differs between shards, so that the mean over shards is not the mean over
  # tokens.
  mask = (rng.random(shape) < np.linspace(0.1, 0.9, ROWS)[:, None]) & (segments > 0)
  text = packing.TextBatch(
    rng.integers(1, 64, shape).astype(np.int32),
    rng.integers(1, 64, shape).astype(np.int32),
    mask.astype(np.float32),
    segments,
    positions,
    np.zeros(shape, np.int32),
  )
  batch = shards.batch(text, None)
  return run(model, variables, boxed, batch, shards, language_step.gradients)


def generation_case(adapter, shards):
  model, boxed, variables = tiny_decoder(adapter)
  placed = jax.tree.map(jax.device_put, variables, sharding.tree(shards.mesh, shards.rules, boxed))
  prompts = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14]]
  sampling = generation.SamplingConfig(max_tokens=5)
  with shards.use():
    texts = generation.generate(model, placed, prompts, sampling=sampling)
  return np.array(texts), "", {}


def mlp_case(adapter, shards):
  config = mlp.MLPConfig(inputs=8, width=16, hidden=32, layers=BLOCKS, layers_per_block=1)
  model = mlp.MLP(config, adapter_config.AdapterConfig(**ADAPTERS[adapter]))
  rng = np.random.default_rng(3)
  batch = step_lib.Batch(
    rng.normal(size=(ROWS, 8)).astype("f"),
    rng.normal(size=ROWS).astype("f"),
    np.zeros((ROWS, 1), "f"),
  )
  init = jax.jit(lambda key: model.init(key, batch.features, None))
  boxed = jax.eval_shape(init, jax.random.key(0))
  variables = jax.tree.map(np.asarray, nn.meta.unbox(init(jax.random.key(0))))
  variables["params"] = disturbed(variables["params"])
  batch = sharding.place(shards.mesh, batch, leading=0)
  return run(model, variables, boxed, batch, shards, step_lib.gradients)


CASES = {"decoder": decoder_case, "mlp": mlp_case, "generation": generation_case}


def main(arrays: pathlib.Path, facts: pathlib.Path, wanted: list[str]) -> None:
  values, facts_by_case = {}, {}
  for kind, case in CASES.items():
    for adapter in ADAPTERS:
      for name, sizes in MESHES.items():
        key = f"{kind}/{adapter}/{name}"
        if wanted and key not in wanted:
          continue
        if f"{adapter}/{name}" not in ONLY.get(kind, (f"{adapter}/{name}",)):
          continue
        if name == "atoms" and (kind, adapter) != ("decoder", "queryable"):
          continue
        devices = jax.devices()[: 1 if name == "one" else 8]
        layout = mesh_lib.MeshConfig(**sizes)
        shards = language_shards.Shards(mesh_lib.make(layout, devices), layout.rules)
        outputs, text, local = case(adapter, shards)
        for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
          values[key + jax.tree_util.keystr(path)] = np.asarray(leaf)
        facts_by_case[key] = {"collectives": collectives(text), "local": local}
        print(key, flush=True)
  np.savez(arrays, **values)
  facts.write_text(json.dumps(facts_by_case))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:])
