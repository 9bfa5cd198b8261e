"""Logical axes are mapped to mesh axes, for parameters and optimiser states."""

import types

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from qlora_jax import errors
from qlora_jax.adapters import config as adapter_config
from qlora_jax.models import decoder
from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.parallel import sharding
from qlora_jax.training import optimizer as optimizer_lib

MESH = jax.sharding.AbstractMesh((1, 2, 2, 2), mesh_lib.AXES)
SIZES = dict(MESH.shape)
CONFIG = decoder.DecoderConfig(
  vocabulary=64, width=16, hidden=32, layers=2, heads=4, groups=2, head_dim=8
)


def specs(method, rules=mesh_lib.DEFAULT_RULES, **fields):
  adapter = adapter_config.AdapterConfig(family=method, rank=4, atoms=8, **fields)
  shardings = sharding.tree(MESH, rules, decoder.abstract(CONFIG, adapter))
  return jax.tree.map(lambda leaf: leaf.spec, shardings)


@pytest.mark.parametrize(
  ("shape", "names", "rules", "spec"),
  [
    ((8, 8), ("embed", "mlp"), mesh_lib.DEFAULT_RULES, P("fsdp", "tensor")),
    ((8, 7), ("embed", "mlp"), mesh_lib.DEFAULT_RULES, P("fsdp")),  # 2 does not divide 7
    ((3, 8), ("rank", "mlp"), mesh_lib.DEFAULT_RULES, P(None, ("tensor", "fsdp"))),
    ((3, 6), ("rank", "mlp"), mesh_lib.DEFAULT_RULES, P(None, "tensor")),
    ((8, 8), ("atoms", "query"), mesh_lib.DEFAULT_RULES, P()),
    ((8, 8), ("embed", "mlp"), (("mlp", "fsdp"), ("embed", "fsdp")), P(None, "fsdp")),
    ((8, 3), ("atoms", "query"), (("atoms", ("fsdp", "tensor")),), P(("fsdp", "tensor"))),
    (
      (8, 4, 6),
      ("batch", None, "mlp"),
      mesh_lib.DEFAULT_RULES,
      P(("data", "fsdp"), None, "tensor"),
    ),
    ((2, 4), ("batch", None), (), P()),  # fewer rows than shards: every device has all rows
  ],
)
def test_the_first_rule_that_fits_splits_an_axis(shape, names, rules, spec):
  assert sharding.spec(shape, names, SIZES, rules) == spec


def test_the_base_is_split_over_fsdp_and_tensor():
  base = specs("none")["base"]
  layer = base["stack"]["blocks"]["layer_0"]
  assert layer["q"]["kernel"] == layer["mlp"]["up"]["kernel"] == P(None, "fsdp", "tensor")
  assert layer["o"]["kernel"] == layer["mlp"]["down"]["kernel"] == P(None, "tensor", "fsdp")
  assert base["embedding"] == P("tensor", "fsdp") and base["head"] == P("fsdp", "tensor")
  assert layer["attention_norm"]["scale"] == P()


@pytest.mark.parametrize("method", ["lora", "dora", "comol", "queryable", "lora_xs"])
def test_factors_are_split_as_their_map_is(method):
  collections = specs(method)
  tree = collections["frozen" if method == "lora_xs" else "params"]
  layer = tree["stack"]["blocks"]["layer_0"]
  for name, of_a, of_b in (
    ("q", P(None, "fsdp"), P(None, None, ("tensor", "fsdp"))),
    ("o", P(None, ("tensor", "fsdp")), P(None, None, "fsdp")),
  ):
    assert layer[name]["branch"]["lora_a"] == of_a and layer[name]["branch"]["lora_b"] == of_b
  assert layer["mlp"]["down"]["branch"]["lora_a"] == P(None, ("tensor", "fsdp"))


def test_lilys_experts_are_split_as_their_map_is():
  memory = specs("lily")["params"]["stack"]["memory"]
  assert memory["lily_b_q"] == P(None, None, ("tensor", "fsdp"))
  assert memory["lily_b_down"] == P(None, None, "fsdp")


def test_the_memory_is_replicated_unless_a_rule_splits_its_atoms():
  fields = {"instruction_dim": 6, "prior_weight": 1.0}
  memory = specs("queryable", **fields)["params"]["stack"]["memory"]
  assert set(memory.values()) == {P()} and len(memory) == 3
  split = specs("queryable", (*mesh_lib.DEFAULT_RULES, ("atoms", "tensor")), **fields)
  assert set(split["params"]["stack"]["memory"].values()) == {P("tensor")}


def test_moments_are_split_as_their_parameters():
  adapter = adapter_config.AdapterConfig(rank=4, atoms=8)
  boxed = decoder.abstract(CONFIG, adapter)["params"]
  params = sharding.tree(MESH, mesh_lib.DEFAULT_RULES, boxed)
  config = optimizer_lib.OptimizerConfig(memory_multiplier=2.0, weight_decay=0.1)
  tx = optimizer_lib.make(config)
  state = jax.eval_shape(tx.init, nn.meta.unbox(boxed))
  shardings = sharding.optimizer(tx, state, params, MESH)
  adam = shardings[1]
  assert adam.mu == params and adam.nu == params and adam.count.spec == P()
  assert jax.tree.structure(shardings) == jax.tree.structure(state)


class Device:
  """A device with the attributes that `own_rows` reads."""

  def __init__(self, process):
    self.process_index = process


@pytest.mark.parametrize(
  ("processes", "sizes", "share"),
  [
    ([0, 0, 1, 1, 2, 2, 3, 3], (1, 1, 8, 1), (1, 4)),
    (
      [0, 1, 0, 1, 2, 3, 2, 3],
      (1, 1, 8, 1),
      (1, 4),
    ),  # the layout follows the network, not the hosts
    ([0, 0, 1, 1, 2, 2, 3, 3], (1, 1, 4, 2), (1, 4)),
    ([0, 0, 1, 1, 2, 2, 3, 3], (1, 1, 2, 4), (0, 2)),  # two processes hold the same rows
    ([0, 0, 1, 1, 2, 2, 3, 3], (1, 1, 1, 8), (0, 1)),
  ],
)
def test_a_process_reads_the_rows_of_its_devices(processes, sizes, share, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  mesh = types.SimpleNamespace(
    devices=np.array([Device(one) for one in processes]).reshape(sizes),
    shape=dict(zip(mesh_lib.AXES, sizes, strict=True)),
  )
  assert sharding.own_rows(mesh) == share


def test_uneven_parts_of_the_batch_are_refused_in_one_line(monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  devices = np.array([Device(one) for one in (0, 0, 0, 1, 1, 1)]).reshape(1, 1, 3, 2)
  mesh = types.SimpleNamespace(
    devices=devices, shape=dict(zip(mesh_lib.AXES, (1, 1, 3, 2), strict=True))
  )
  with pytest.raises(errors.UserError, match=r"^mesh: the processes do not hold equal parts"):
    sharding.own_rows(mesh)
