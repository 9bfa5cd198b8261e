"""A block of layers with one routed operator, and the scan over blocks that carries the summary.

Any residual layer with these methods fits; the MLP and the decoder share this file:

  __call__(hidden, routing, shared) -> (hidden, tuple of routings its branches made themselves)
  anchor_state(hidden) -> z     the low-rank state of the layer's first adapted map at another
                                hidden state; only the history `output` asks for it

A model that hands `context` to the stack has layers of the longer form

  __call__(hidden, routing, shared, context, cache, place) -> (hidden, cache, routings)

with `context` the same for all layers (positions, masks), `cache` a tree carried from layer to
layer, and `place` = (block index, slot in the block). The adapted maps ask `routing`
(`router.BlockRouting`) for the routed operator; the first to ask is the block's anchor.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import contraction, depth_scan, memory, router, summary
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array, PyTree

REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class RoutingRecord(NamedTuple):
  """What every block routed: weights and logits [N, G, *batch, M], or None without a router.

  G counts the routers of a block: 1 for Queryable LoRA (with `operator='map'` one a name of map),
  one a map for Lily and CoMoL. `log_prior` [*batch, M] is the language prior that all blocks share,
  or None.
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
    map_names: the adapted maps of a layer.
    carries: whether the block reads the summary's carry and gives it back with its state in it;
      else it is given what each of its routers reads, and gives back the state.
  """

  config: config_lib.AdapterConfig
  make_layer: Callable[..., nn.Module]
  layers: int
  map_names: tuple[str, ...]
  carries: bool = True

  @property
  def sharing(self) -> int:
    """How many maps of the block share one routed operator."""
    return self.layers * (1 if self.config.operator == "map" else len(self.map_names))

  def setup(self):
    self.stack = [
      self.make_layer(maps=self.sharing, name=f"layer_{index}") for index in range(self.layers)
    ]
    if not self.config.routed:
      return
    make = functools.partial(router.BlockRouter, self.config, self.sharing, self.carries)
    if self.config.operator == "map":
      self.router = {name: make() for name in self.map_names}
    else:
      self.router = make()
    self.gate = router.SummaryGate(self.config)

  def __call__(self, carry, shared, instruction, log_prior, context):
    """One step of the scan; carry = (hidden [*batch, D], summary's carry, cache, block index)."""
    hidden, running, cache, index = carry
    hidden = sharding.tokens(hidden)
    cfg, routing, own = self.config, None, []
    if cfg.routed:
      routers = self.router if cfg.operator == "map" else {router.WHOLE_BLOCK: self.router}
      given = (instruction, log_prior)
      routing = router.BlockRouting(
        {
          name: lambda state, each=each, name=name: each(
            state,
            running if self.carries else running[each.name],
            index,
            memory.of_map(cfg, shared, name),
            *given,
          )
          for name, each in routers.items()
        }
      )
    for slot, layer in enumerate(self.stack):
      if context is None:
        hidden, routings = layer(hidden, routing, shared)
      else:
        hidden, cache, routings = layer(hidden, routing, shared, context, cache, (index, slot))
      own.extend(routings)
    if cfg.routed:
      own = [*routing.routings.values(), *own]
    if cfg.routed and cfg.summary != "none" and cfg.routing == "query":
      if cfg.history == "routed":
        name, made = next(iter(routing.routings.items()))  # of the block's first anchor
        atoms = memory.of_map(cfg, shared, name)["atoms"]
        left = contraction.contract(
          cfg, self.sharing, routing.state, made.weights, made.operator, atoms
        )
      else:
        left = self.stack[0].anchor_state(hidden)
      running = self.gate(running, left, index) if self.carries else left
    record = RoutingRecord(None, None)
    if own:
      record = RoutingRecord(
        jnp.stack([each.weights for each in own]), jnp.stack([each.logits for each in own])
      )
    return (sharding.tokens(hidden), running, cache, index + 1), record


class BlockStack(nn.Module):
  """The scan over N blocks; the shared memory enters as a broadcast input.

  Attributes:
    unroll: runs a Python loop over slices of the same stacked parameters instead of the scan.
    scan_unroll: blocks that one iteration of the compiled scan runs; more is faster for small
      blocks and slower to compile.
    remat: what a block keeps for its gradient, a key of `REMAT`: everything, only its input, or
      its input and the results of its matrix products.
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
    hidden: Array,
    instruction: Array | None,
    context: PyTree = None,
    cache: PyTree = None,
  ):
    """Runs hidden [*batch, D] through all blocks, with the instruction [*batch, E] or None.

    Returns:
      (hidden, `RoutingRecord`), and the cache as a third item when a context is given.
    """
    cfg = self.config
    shared = memory.SharedParameters(cfg, self.map_outputs, name="memory")()
    log_prior = memory.log_prior(cfg, shared, instruction)
    kind = cfg.summary if cfg.uses_query else "none"
    # The N states of a token are kept as its hidden states are; a single one in float32.
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
      # A scan's body is compiled on its own, so that only the loop needs the barrier against CSE.
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
      own = {name: tree["blocks"] for name, tree in self.variables.items() if "blocks" in tree}
      params = own.pop("params")
      queries = {
        name: tree["pseudo_query"] for name, tree in params.items() if name.startswith("router")
      }
      last, record = depth_scan.scan(
        functools.partial(_step, Block(*arguments, carries=False, parent=None)),
        params,
        queries,
        own,
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


def _step(module: Block, own, fixed, hidden, summaries, index, shared, context):
  """A block as `depth_scan.scan` runs it."""
  carry = (hidden, summaries, None, index)
  (hidden, state, _, _), record = module.apply({"params": own, **fixed}, carry, *shared, context)
  return hidden, state, record
