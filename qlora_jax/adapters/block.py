"""A block of layers with one routed operator, and the scan over blocks that carries the summary.

The MLP and the decoder share this file. A residual layer needs these methods:

  __call__(hidden, routing, shared) -> (hidden, tuple of routings that its branches made)
  anchor_state(hidden) -> z     the low-rank state of the layer's first adapted map at another
                                hidden state; only the history `output` calls it

A model that gives the stack a `context` has layers of the longer form

  __call__(hidden, routing, shared, context, cache, place) -> (hidden, cache, routings)

with `context` the same for all layers (positions, masks), `cache` a tree carried from layer to
layer, and `place` = (block index, slot in the block). The adapted maps ask `routing`
(`routing.BlockRouting`) for the routed operator; the first map to ask is the block's anchor.
Letters as in `qlora_jax/typing.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import contraction, depth_scan, memory, router, summary
from qlora_jax.adapters import routing as routing_lib
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array, Float, PyTree

REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


# (hidden [*batch, D], the summary's carry, cache, block index)
Carry = tuple[Array, PyTree, PyTree, Array]


class Block(nn.Module):
  """S layers behind one router.

  Attributes:
    config: the adapter.
    make_layer: builds one layer by its name.
    layers: S.
    map_names: the adapted maps of a layer.
    carries_summary: whether the running summary goes through the block: the block reads its carry,
      and returns it with the block's state written. Else the block gets the summary of each router
      by name, and returns its state alone (`depth_scan.py`).
  """

  config: config_lib.AdapterConfig
  make_layer: Callable[..., nn.Module]
  layers: int
  map_names: tuple[str, ...]
  carries_summary: bool = True

  def setup(self):
    self.stack = [self.make_layer(name=f"layer_{index}") for index in range(self.layers)]
    if not self.config.routed:
      return
    # How many maps of the block share one routed operator.
    sharing = self.layers * (1 if self.config.operator == "map" else len(self.map_names))
    make_router = functools.partial(router.BlockRouter, self.config, sharing, self.carries_summary)
    if self.config.operator == "map":
      self.router = {name: make_router() for name in self.map_names}
    else:
      self.router = make_router()
    self.gate = router.SummaryGate(self.config)

  def __call__(
    self,
    carry: Carry,
    shared: memory.Shared,
    instruction: Float[Array, "*#batch E"] | None,
    log_prior: Float[Array, "*#batch M"] | None,
    context: PyTree,
  ) -> tuple[Carry, routing_lib.RoutingRecord]:
    """One step of the scan."""
    hidden, running, cache, index = carry
    hidden = sharding.tokens(hidden)
    cfg, routing, branch_routings = self.config, None, []
    if cfg.routed:
      routing = self._routing(running, index, shared, instruction, log_prior)
    for slot, layer in enumerate(self.stack):
      if context is None:
        hidden, layer_routings = layer(hidden, routing, shared)
      else:
        hidden, cache, layer_routings = layer(
          hidden, routing, shared, context, cache, (index, slot)
        )
      branch_routings.extend(layer_routings)
    if cfg.uses_query and cfg.summary != "none":
      state = self._summarised_state(hidden, routing, shared)
      running = self.gate(running, state, index) if self.carries_summary else state
    routings = [*routing.routings.values(), *branch_routings] if cfg.routed else branch_routings
    record = routing_lib.RoutingRecord(None, None)
    if routings:
      record = routing_lib.RoutingRecord(
        jnp.stack([routed.weights for routed in routings]),
        jnp.stack([routed.logits for routed in routings]),
      )
    return (sharding.tokens(hidden), running, cache, index + 1), record

  def _routing(
    self,
    running: PyTree,
    index: Array,
    shared: memory.Shared,
    instruction: Array | None,
    log_prior: Array | None,
  ) -> routing_lib.BlockRouting:
    """The block's routers, each waiting for the state of its anchor."""
    per_map = self.config.operator == "map"
    routers = self.router if per_map else {routing_lib.WHOLE_BLOCK: self.router}

    def route(name: str, state: Array) -> routing_lib.Routing:
      block_router = routers[name]
      carry = running if self.carries_summary else running[block_router.name]
      seen = memory.of_map(self.config, shared, name)
      return block_router(state, carry, index, seen, instruction, log_prior)

    return routing_lib.BlockRouting({name: functools.partial(route, name) for name in routers})

  def _summarised_state(
    self, hidden: Array, routing: routing_lib.BlockRouting, shared: memory.Shared
  ) -> Float[Array, "*batch R"]:
    """h_b, which the block leaves to the summary of the blocks after it."""
    cfg = self.config
    if cfg.history == "output":
      return self.stack[0].anchor_state(hidden)
    name, routed = next(iter(routing.routings.items()))  # of the block's first anchor
    atoms = memory.of_map(cfg, shared, name)["atoms"]
    return contraction.contract(routed, routing.state, atoms, cfg.kept_atoms)


class BlockStack(nn.Module):
  """The scan over N blocks; the shared memory enters as a broadcast input.

  Attributes:
    unroll: runs a Python loop over slices of the same stacked parameters instead of the scan.
    scan_unroll: blocks that one iteration of the compiled scan runs; more is faster for small
      blocks and slower to compile.
    remat: which states a block keeps for its gradient, a key of `REMAT`: all ('none'), only its
      input ('full'), or its input and the results of its matrix products ('dots').
  """

  config: config_lib.AdapterConfig
  make_layer: Callable[..., nn.Module]
  blocks: int
  layers: int
  map_outputs: tuple[tuple[str, int, str], ...]
  unroll: bool = False
  scan_unroll: int = 1
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    hidden: Float[Array, "*batch D"],
    instruction: Float[Array, "*#batch E"] | None,
    context: PyTree = None,
    cache: PyTree = None,
  ) -> tuple[Any, ...]:
    """Runs hidden through all blocks, with the instruction or None.

    Returns:
      (hidden, `routing.RoutingRecord`), and the cache as a third item when a context is given.
    """
    cfg = self.config
    shared = memory.SharedParameters(cfg, self.map_outputs, name="memory")()
    log_prior = memory.log_prior(cfg, shared, instruction)
    kind = cfg.summary if cfg.uses_query else "none"
    # N states per token have the hidden states' dtype; a single state is float32.
    dtype = hidden.dtype if kind == "attention" else jnp.float32
    running = summary.initial(kind, hidden.shape[:-1], self.blocks, cfg.rank, dtype)
    carry = (hidden, running, cache, jnp.zeros((), jnp.int32))
    names = tuple(name for name, *_ in self.map_outputs)
    arguments = (cfg, self.make_layer, self.layers, names)
    inputs = (shared, instruction, log_prior, context)
    applied = not self.is_mutable_collection("params")
    looped = self.unroll and applied
    history = kind == "attention" and self.remat == "full" and cache is None
    block_class = Block
    if self.remat != "none":
      # XLA compiles a scan's body apart, so that only the loop needs the barrier against CSE.
      block_class = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=looped)
    if looped:
      records = []
      for index in range(self.blocks):
        variables = jax.tree.map(
          lambda leaf, index=index: leaf[index],
          {name: tree["blocks"] for name, tree in self.variables.items() if "blocks" in tree},
        )
        carry, record = block_class(*arguments, parent=None).apply(variables, carry, *inputs)
        records.append(record)
      record = jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)
    elif history and applied:
      fixed = {name: tree["blocks"] for name, tree in self.variables.items() if "blocks" in tree}
      params = fixed.pop("params")
      queries = {
        name: tree["pseudo_query"] for name, tree in params.items() if name.startswith("router")
      }
      last, record = depth_scan.scan(
        functools.partial(_step, Block(*arguments, carries_summary=False, parent=None)),
        params,
        queries,
        fixed,
        hidden,
        running,
        (shared, instruction, log_prior),
        context,
      )
      carry = (last, None, None, None)
    else:
      scanned = nn.scan(
        block_class,
        variable_axes={"params": 0, "base": 0, "frozen": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * len(inputs),
        length=self.blocks,
        unroll=min(self.scan_unroll, self.blocks),
        metadata_params={nn.PARTITION_NAME: "blocks"},
      )
      carry, record = scanned(*arguments, name="blocks")(carry, *inputs)
    record = record._replace(log_prior=log_prior)
    return (carry[0], record) if context is None else (carry[0], record, carry[2])


def _step(module: Block, params, fixed, hidden, summaries, index, shared, context):
  """A block as `depth_scan.scan` runs it."""
  carry = (hidden, summaries, None, index)
  variables = {"params": params, **fixed}
  (hidden, state, _, _), record = module.apply(variables, carry, *shared, context)
  return hidden, state, record
