"""The decoder-only language model of all families, over N blocks of S layers in one scan.

A family is a `DecoderConfig`, see `families.py`; no code here depends on its name. The layer is
`decoder_layer.py`; the scan over blocks and its routing are `adapters/block.py`. Letters as in
`qlora_jax/typing.py`.
"""

import functools
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import block
from qlora_jax.adapters import config as adapter_config
from qlora_jax.adapters import routing as routing_lib
from qlora_jax.models import attention, decoder_config, decoder_layer, norms, rope
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array

DecoderConfig = decoder_config.DecoderConfig
MAPS = decoder_config.MAPS
DTYPES = decoder_config.DTYPES


class Output(NamedTuple):
  """`hidden` [B, T, D] after the last norm, the blocks' routing, and the extended cache."""

  hidden: Array
  routing: routing_lib.RoutingRecord
  cache: attention.Cache | None


class Decoder(nn.Module):
  """Maps tokens to hidden states; `logits` maps selected hidden states to scores."""

  config: DecoderConfig
  adapter: adapter_config.AdapterConfig

  def setup(self):
    cfg, dtype = self.config, jnp.dtype(self.config.base_dtype)

    def table(name, shape, axes):
      init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
      return self.variable("base", name, lambda: init(self.make_rng("params"), shape, dtype))

    self.embedding = table("embedding", (cfg.vocabulary, cfg.width), ("vocabulary", "embed"))
    if cfg.learned_positions:
      self.positions = table("positions", (cfg.learned_positions, cfg.width), (None, "embed"))
    if not cfg.tied:
      self.head = table("head", (cfg.width, cfg.vocabulary), ("embed", "vocabulary"))
    if self.adapter.instruction_in_input:
      # Zeros, so that the adapted network starts as its base for every instruction.
      self.instruction_input = self.param(
        "instruction_input",
        nn.with_logical_partitioning(nn.initializers.zeros, ("instruction", "embed")),
        (self.adapter.instruction_dim, cfg.width),
      )
    self.stack = block.BlockStack(
      self.adapter,
      functools.partial(decoder_layer.Layer, cfg, self.adapter),
      cfg.blocks,
      cfg.layers_per_block,
      tuple(
        (name, cfg.map_shapes[name][1], decoder_config.MAP_AXES[name][1])
        for name in cfg.adapted_maps
      ),
      cfg.unroll,
      1,
      cfg.remat,
    )
    self.norm = norms.Norm(cfg.norm, cfg.width, cfg.norm_epsilon, cfg.base_dtype)

  def __call__(
    self,
    tokens: Array,
    positions: Array | None = None,
    segments: Array | None = None,
    instruction: Array | None = None,
    cache: attention.Cache | None = None,
  ) -> Output:
    """Runs tokens [B, T] int32.

    Args:
      tokens: ids.
      positions: int32 [B, T], position of each token in its text; by default 0, 1, .. per row.
      segments: int32 [B, T], the text that each token belongs to, `attention.PADDING` for padding;
        by default one text per row.
      instruction: embedding [B, E] per row or [B, T, E] per token, or None.
      cache: keys and values of the earlier tokens; the new ones are added.
    """
    cfg, (batch, length) = self.config, tokens.shape
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if segments is None:
      segments = jnp.ones((batch, length), jnp.int32)
    hidden = jnp.take(self.embedding.value, tokens, axis=0).astype(cfg.dtype)
    # The lookup keeps the table's split of D; then the batch is split over all data axes.
    hidden = sharding.tokens(sharding.constrain(hidden, "replicas", None, "embed"))
    if cfg.embedding_scale != 1.0:
      hidden = hidden * jnp.asarray(cfg.embedding_scale, hidden.dtype)
    cos = sin = None
    if cfg.learned_positions:
      hidden = hidden + jnp.take(self.positions.value, positions, axis=0).astype(cfg.dtype)
    else:
      cos, sin = rope.tables(cfg.ropes, cfg.head_dim, positions)
    if instruction is not None and instruction.ndim == 2:
      instruction = jnp.broadcast_to(instruction[:, None], (batch, length, instruction.shape[-1]))
    if self.adapter.instruction_in_input:
      hidden = hidden + (instruction @ self.instruction_input).astype(cfg.dtype)
    start, buffers = None, None
    key_positions, key_segments = positions, segments
    if cache is not None:
      start, buffers = cache.length, (cache.keys, cache.values)
      cache = attention.extend(cache, positions, segments)
      key_positions, key_segments = cache.positions, cache.segments
    context = decoder_layer.Context(
      attention.MaskInfo(positions, key_positions, segments, key_segments),
      cos,
      sin,
      jnp.asarray(cfg.layer_ropes or (0,) * cfg.layers, jnp.int32),
      start,
    )
    hidden, routing, buffers = self.stack(hidden, instruction, context, buffers)
    if cache is not None:
      cache = cache._replace(keys=buffers[0], values=buffers[1])
    return Output(self.norm(hidden), routing, cache)

  def output_table(self, dtype: jnp.dtype) -> Array:
    """The matrix of `logits`: [V, D] when tied, else [D, V]; split over the vocabulary only."""
    if self.config.tied:
      return sharding.constrain(self.embedding.value.astype(dtype), "vocabulary", None)
    return sharding.constrain(self.head.value.astype(dtype), None, "vocabulary")

  def logits(self, hidden: Array, table: Array | None = None) -> Array:
    """Scores float32 [*batch, V] of hidden states [*batch, D].

    Args:
      hidden: as in `Output`.
      table: `output_table`, for callers that compute logits in many parts.
    """
    cfg = self.config
    table = self.output_table(hidden.dtype) if table is None else table
    scores = jnp.einsum(
      "...d,vd->...v" if cfg.tied else "...d,dv->...v",
      hidden,
      table,
      preferred_element_type=jnp.float32,
    )
    scores = sharding.constrain(scores, "batch", *[None] * (scores.ndim - 2), "vocabulary")
    if cfg.logit_soft_cap:
      scores = cfg.logit_soft_cap * jnp.tanh(scores / cfg.logit_soft_cap)
    return scores

  def score(self, *arguments, **options) -> tuple[Array, Output]:
    """Logits float32 [B, T, V] of every position, and the `Output`; for short texts and tests."""
    output = self(*arguments, **options)
    return self.logits(output.hidden), output

  def initialise(self, tokens: Array, instruction: Array | None = None) -> Any:
    """Uses every variable once, for `init`."""
    return self.logits(self(tokens, instruction=instruction).hidden[:, -1:])


def abstract(
  config: DecoderConfig, adapter: adapter_config.AdapterConfig = decoder_layer.NO_ADAPTER
) -> dict[str, Any]:
  """Shapes and dtypes of all variables, by collection, boxed with their logical axes."""
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  instruction = None
  if adapter.instruction_dim:
    instruction = jax.ShapeDtypeStruct((1, adapter.instruction_dim), jnp.float32)
  model = Decoder(config, adapter)
  return jax.eval_shape(
    lambda key, tokens, instruction: model.init(key, tokens, instruction, method="initialise"),
    jax.random.key(0),
    tokens,
    instruction,
  )
