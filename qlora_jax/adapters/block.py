"""A block of layers with one routed operator, and the scan over blocks that carries the summary.

Any residual layer with the two methods below fits; the MLP and the decoder share this file:

  anchor_state(hidden) -> z          the low-rank state of the layer's first adapted map, step (1)
  __call__(hidden, routing, shared)  -> (hidden, tuple of routings its branches made themselves)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import contraction, memory, router, summary
from qlora_jax.typing import Array


class RoutingRecord(NamedTuple):
  """What every block routed: weights and logits [N, G, *batch, M], or None without a router.

  G counts the routers of a block: 1 for Queryable LoRA, one a map for Lily and CoMoL. `log_prior`
  [*batch, M] is the language prior that all blocks share, or None.
  """

  weights: Array | None
  logits: Array | None
  log_prior: Array | None = None


class Block(nn.Module):
  """S layers behind one router.

  Attributes:
    config: the adapter.
    make_layer: builds one layer, given the number of adapted maps in the block and a name.
    layers: S.
    maps: adapted maps in the block.
  """

  config: config_lib.AdapterConfig
  make_layer: Callable[..., nn.Module]
  layers: int
  maps: int

  def setup(self):
    self.stack = [
      self.make_layer(maps=self.maps, name=f"layer_{index}") for index in range(self.layers)
    ]
    if self.config.routed:
      self.router = router.BlockRouter(self.config, self.maps)
      self.gate = router.SummaryGate(self.config)

  def __call__(self, carry, shared, instruction, log_prior):
    """One step of the scan; carry = (hidden [*batch, D], summary's carry, block index)."""
    hidden, running, index = carry
    cfg, routing, own = self.config, None, []
    if cfg.routed:
      state = self.stack[0].anchor_state(hidden)
      routing = self.router(state, running, index, shared, instruction, log_prior)
      own.append(routing)
    for layer in self.stack:
      hidden, routings = layer(hidden, routing, shared)
      own.extend(routings)
    if cfg.routed and cfg.summary != "none" and cfg.routing == "query":
      if cfg.history == "routed":
        left = contraction.contract(
          cfg, self.maps, state, routing.weights, routing.operator, shared["atoms"]
        )
      else:
        left = self.stack[0].anchor_state(hidden)
      running = self.gate(running, left, index)
    record = RoutingRecord(None, None)
    if own:
      record = RoutingRecord(
        jnp.stack([each.weights for each in own]), jnp.stack([each.logits for each in own])
      )
    return (hidden, running, index + 1), record


class BlockStack(nn.Module):
  """The scan over N blocks; the shared memory enters as a broadcast input.

  Attributes:
    unroll: runs a Python loop over slices of the same stacked parameters instead of the scan.
  """

  config: config_lib.AdapterConfig
  make_layer: Callable[..., nn.Module]
  blocks: int
  layers: int
  maps_per_layer: int
  map_outputs: tuple[tuple[str, int], ...]
  unroll: bool = False

  @nn.compact
  def __call__(self, hidden: Array, instruction: Array | None) -> tuple[Array, RoutingRecord]:
    """Runs hidden [*batch, D] through all blocks, with the instruction [*batch, E] or None."""
    cfg = self.config
    shared = memory.SharedParameters(cfg, self.map_outputs, name="memory")()
    log_prior = memory.log_prior(cfg, shared, instruction)
    kind = cfg.summary if cfg.uses_query else "none"
    running = summary.initial(kind, hidden.shape[:-1], self.blocks, cfg.rank, hidden.dtype)
    carry = (hidden, running, jnp.zeros((), jnp.int32))
    arguments = (cfg, self.make_layer, self.layers, self.layers * self.maps_per_layer)
    if self.unroll and not self.is_mutable_collection("params"):
      records = []
      for index in range(self.blocks):
        variables = jax.tree.map(
          lambda leaf, index=index: leaf[index],
          {name: tree["blocks"] for name, tree in self.variables.items() if "blocks" in tree},
        )
        block = Block(*arguments, parent=None)
        carry, record = block.apply(variables, carry, shared, instruction, log_prior)
        records.append(record)
      record = jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)
      return carry[0], record._replace(log_prior=log_prior)
    scanned = nn.scan(
      Block,
      variable_axes={"params": 0, "base": 0, "frozen": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
      length=self.blocks,
      metadata_params={nn.PARTITION_NAME: "blocks"},
    )
    carry, record = scanned(*arguments, name="blocks")(carry, shared, instruction, log_prior)
    return carry[0], record._replace(log_prior=log_prior)
