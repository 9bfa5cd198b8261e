"""The router of a block: steps (2)-(5) of Queryable LoRA. Letters as in `qlora_jax/typing.py`."""

from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import config as config_lib
from qlora_jax.adapters import contraction, functional, memory, routing, summary
from qlora_jax.typing import Array, Float, Int, typed


class BlockRouter(nn.Module):
  """Forms the query of one block and retrieves a convex combination of atoms.

  Attributes:
    config: the adapter.
    maps: how many adapted maps of the block share the routed operator.
    carries_summary: whether the router gets the summary's carry and reads it; else it gets the
      summary itself. As in `block.Block`.
  """

  config: config_lib.AdapterConfig
  maps: int
  carries_summary: bool = True

  @nn.compact
  @typed
  def __call__(
    self,
    state: Float[Array, "*batch R"],
    carry: Array,
    index: Int[Array, ""] | int,
    shared: memory.Shared,
    instruction: Float[Array, "*#batch E"] | None,
    log_prior: Float[Array, "*#batch M"] | None,
  ) -> routing.Routing:
    """Routes one block, steps (3) to (5), and builds C if the order of contraction needs it.

    Args:
      state: z of the block's anchor map.
      carry: the summary's carry, or the summary; see `carries_summary`.
      index: of the block.
      shared: the memory, as the router's maps see it.
      instruction: e; log_prior: log pi(e).
    """
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
    order, equal, operator = contraction.choose(cfg, self.maps), cfg.weights == "equal", None
    if order == "gather" and cfg.kept_atoms < cfg.atoms:
      chosen = functional.sparse_choice(logits, cfg.kept_atoms, equal)
      # The compiler drops the dense weights unless something reads them: penalties, statistics.
      dense = functional.dense_weights(*chosen, cfg.atoms)
      operator = functional.gathered_operator(*chosen, shared["atoms"])
      return routing.Routing(dense, logits, operator, order)
    weights = functional.sparse_weights(logits, cfg.kept_atoms, equal)
    if order == "operator":
      operator = functional.routed_operator(weights, shared["atoms"])
    return routing.Routing(weights, logits, operator, order)

  def _query(
    self, state: Array, carry: Array, index: Array | int, instruction: Array | None
  ) -> Array:
    """q [*batch, Q], step (3)."""
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
    running = (
      summary.read(cfg.summary, carry, index, pseudo_query) if self.carries_summary else carry
    )
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
