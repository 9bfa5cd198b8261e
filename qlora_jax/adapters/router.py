"""The router of a block: steps (2)-(5) of Queryable LoRA. Letters as in `qlora_jax/typing.py`."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import contraction, functional, memory, summary
from qlora_jax.typing import Array

WHOLE_BLOCK = "block"  # the name of the router that all maps share


class Routing(NamedTuple):
  """What a block routed: weights and logits [*batch, M], and C [*batch, R, R] if it is built."""

  weights: Array
  logits: Array
  operator: Array | None


class BlockRouting:
  """The routings of one block, each made once, by the first adapted map that asks for it.

  That map is the anchor: its low-rank state is the z of step (1). With `operator='block'` there is
  one routing, with 'map' one a name of map. The object lives inside one trace of one block.

  Attributes:
    state: z [*batch, R] of the block's first anchor, or None before it is reached.
    routings: the `Routing` of each router, in the order in which they were made.
  """

  def __init__(self, routers: Mapping[str, Callable[[Array], Routing]]):
    self._routers = routers
    self.state: Array | None = None
    self.routings: dict[str, Routing] = {}

  def at(self, map_name: str, low_rank_state: Callable[[], Array]) -> Routing:
    """The routing of a map; the first call evaluates `low_rank_state` and routes it."""
    name = map_name if map_name in self._routers else WHOLE_BLOCK
    if name not in self.routings:
      state = low_rank_state()
      self.state = state if self.state is None else self.state
      self.routings[name] = self._routers[name](state)
    return self.routings[name]


class BlockRouter(nn.Module):
  """Forms the query of one block and retrieves a convex combination of atoms.

  Attributes:
    config: the adapter.
    maps: adapted maps in the block, which share the routed operator.
    reads: whether it reads the summary's carry; else it is given what it would read.
  """

  config: config_lib.AdapterConfig
  maps: int
  reads: bool = True

  @nn.compact
  def __call__(
    self,
    state: Array,
    carry: Array,
    index: Array | int,
    shared: memory.Shared,
    instruction: Array | None,
    log_prior: Array | None,
  ) -> Routing:
    """Routes z [*batch, R] of block `index`, given the summary's carry and the instruction."""
    cfg = self.config
    if cfg.routing == "static":
      mixture = self.param(
        "mixture", nn.with_logical_partitioning(nn.initializers.zeros, ("atoms",)), (cfg.atoms,)
      )
      logits = jnp.broadcast_to(mixture, (*state.shape[:-1], cfg.atoms))
      if log_prior is not None and cfg.prior_weight:
        logits = logits + cfg.prior_weight * log_prior
    else:
      query = self._query(state, carry, index, instruction)
      logits = functional.router_logits(query, shared["atom_keys"], log_prior, cfg.prior_weight)
    if cfg.temperature != 1.0:
      logits = logits / cfg.temperature
    kind, equal, operator = contraction.choose(cfg, self.maps), cfg.weights == "equal", None
    if kind == "gather" and cfg.kept_atoms < cfg.atoms:
      chosen = functional.sparse_choice(logits, cfg.kept_atoms, equal)
      # Dense weights are made only where something reads them: penalties and statistics.
      dense = functional.dense_weights(*chosen, cfg.atoms)
      return Routing(dense, logits, functional.gathered_operator(*chosen, shared["atoms"]))
    weights = functional.sparse_weights(logits, cfg.kept_atoms, equal)
    if kind == "operator":
      operator = functional.routed_operator(weights, shared["atoms"])
    return Routing(weights, logits, operator)

  def _query(self, state, carry, index, instruction):
    cfg = self.config

    def kernel(name, fan_in, axes):
      init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
      return self.param(name, init, (fan_in, cfg.query_dim))

    pseudo_query = None
    if cfg.summary == "attention":  # zeros: the summary starts as the mean of the blocks before
      pseudo_query = self.param(
        "pseudo_query",
        nn.with_logical_partitioning(nn.initializers.zeros, ("rank",)),
        (cfg.rank,),
      )
    running = summary.read(cfg.summary, carry, index, pseudo_query) if self.reads else carry
    return functional.query(
      state,
      running,
      instruction if cfg.instruction_in_query else None,
      kernel("query_state", cfg.rank, ("rank", "query")) if cfg.query_state else None,
      kernel("query_summary", cfg.rank, ("rank", "query")) if running is not None else None,
      kernel("query_instruction", cfg.instruction_dim, ("instruction", "query"))
      if cfg.instruction_in_query
      else None,
      self.param(
        "query_bias",
        nn.with_logical_partitioning(nn.initializers.zeros, ("query",)),
        (cfg.query_dim,),
      )
      if cfg.query_bias
      else None,
    )


class SummaryGate(nn.Module):
  """The gate a_b [R] of the recurrent summary, zero at the start (keep half)."""

  config: config_lib.AdapterConfig

  @nn.compact
  def __call__(self, carry: Array, state: Array, index: Array | int) -> Array:
    """The carry after block `index` left `state` [*batch, R] behind."""
    gate = None
    if self.config.summary == "recurrent":
      gate = self.param(
        "gate",
        nn.with_logical_partitioning(nn.initializers.zeros, ("rank",)),
        (self.config.rank,),
      )
    return summary.write(self.config.summary, carry, state, index, gate)
