"""The decoder-only language model of all families, over N blocks of S layers in one scan.

A family is a `DecoderConfig`, see `families.py`; nothing here asks for its name. The scan over
blocks and its routing are `adapters/block.py`. Letters as in `qlora_jax/typing.py`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax import errors
from qlora_jax.adapters import block, dense, memory, sizing
from qlora_jax.adapters import config as adapter_config
from qlora_jax.adapters import routing as routing_lib
from qlora_jax.models import attention, fast_attention, feed_forward, norms, rope
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array, Float, typed

MAPS = ("q", "k", "v", "o", "gate", "up", "down")
DTYPES = ("float32", "bfloat16")
_NO_ADAPTER = adapter_config.AdapterConfig(family="none")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Shape and kind of a decoder. Hashable, so that a compiled step can be keyed by it.

  Attributes:
    vocabulary: V.
    width, hidden: D and F.
    layers, layers_per_block: L and S, which must divide L.
    heads, groups, head_dim: H, G and K.
    norm, norm_epsilon: a kind of `norms.KINDS`, and what is added under its root.
    post_norms: whether the outputs of attention and feed-forward are normalised too (Gemma).
    qk_norm: whether queries and keys are normalised a head (Qwen3, Gemma 3).
    activation, gated: of the feed-forward network.
    qkv_bias, output_bias, feed_forward_bias: which maps have a bias.
    learned_positions: rows of a learned position table (GPT-2); 0 means rotary positions.
    ropes: the kinds of rotation; layer_ropes: each layer's, by index (empty: all the first).
    layer_windows: keys that each layer sees, 0 for all before (empty: all 0).
    attention_scale: factor on q k^T; 0 means 1/sqrt(K).
    attention_soft_cap, logit_soft_cap: c of c tanh(x / c); 0 means none.
    embedding_scale: factor on token embeddings.
    tied: whether the embedding is the output head.
    max_length: context, in tokens: the longest text that the base was made for.
    adapted: the maps that get an adapter, a subset of `MAPS`.
    base_dtype, dtype: in which the base is stored, and in which activations are computed.
    unroll: a Python loop over the blocks instead of the scan.
    remat: a key of `block.REMAT`.
    attention: a kind of `fast_attention.KINDS`; 'auto' chooses by the platform.
  """

  vocabulary: int
  width: int
  hidden: int
  layers: int
  heads: int
  groups: int
  head_dim: int
  layers_per_block: int = 1
  norm: str = "rms"
  norm_epsilon: float = 1e-5
  post_norms: bool = False
  qk_norm: bool = False
  activation: str = "silu"
  gated: bool = True
  qkv_bias: bool = False
  output_bias: bool = False
  feed_forward_bias: bool = False
  learned_positions: int = 0
  ropes: tuple[rope.RopeConfig, ...] = (rope.RopeConfig(),)
  layer_ropes: tuple[int, ...] = ()
  layer_windows: tuple[int, ...] = ()
  attention_scale: float = 0.0
  attention_soft_cap: float = 0.0
  logit_soft_cap: float = 0.0
  embedding_scale: float = 1.0
  tied: bool = False
  max_length: int = 2048
  adapted: tuple[str, ...] = MAPS
  base_dtype: str = "float32"
  dtype: str = "float32"
  unroll: bool = False
  remat: str = "none"
  attention: str = "auto"

  def __post_init__(self):
    for name in (
      "vocabulary",
      "width",
      "hidden",
      "layers",
      "heads",
      "groups",
      "head_dim",
      "layers_per_block",
    ):
      if getattr(self, name) < 1:
        raise errors.UserError(f"model.{name}: {getattr(self, name)} is not at least 1")
    if self.heads % self.groups:
      raise errors.UserError(f"model.groups: {self.groups} does not divide heads = {self.heads}")
    if self.layers % self.layers_per_block:
      divisors = [s for s in range(1, self.layers + 1) if self.layers % s == 0]
      raise errors.UserError(
        f"model.layers_per_block: {self.layers_per_block} does not divide the model's"
        f" {self.layers} layers; use one of {', '.join(map(str, divisors))}"
      )
    wrong = [name for name in self.adapted if name not in self.maps]
    if wrong:
      raise errors.UserError(
        f"model.adapted: this model has no map {', '.join(map(repr, wrong))};"
        f" use some of {', '.join(self.maps)}"
      )
    if not self.adapted:
      raise errors.UserError(f"model.adapted: empty; use some of {', '.join(self.maps)}")
    for name, known in (
      ("remat", tuple(block.REMAT)),
      ("norm", norms.KINDS),
      ("dtype", DTYPES),
      ("base_dtype", DTYPES),
      ("activation", tuple(feed_forward.ACTIVATIONS)),
      ("attention", fast_attention.KINDS),
    ):
      if getattr(self, name) not in known:
        raise errors.UserError(
          f"model.{name}: {getattr(self, name)!r} is unknown; use one of {', '.join(known)}"
        )

  @property
  def blocks(self) -> int:
    return self.layers // self.layers_per_block

  @property
  def maps(self) -> tuple[str, ...]:
    """The maps of a layer, in the order in which they run."""
    return MAPS if self.gated else tuple(name for name in MAPS if name != "gate")

  @property
  def adapted_maps(self) -> tuple[str, ...]:
    """The adapted maps of a layer in the order in which they run; the first is the anchor."""
    return tuple(name for name in self.maps if name in self.adapted)

  @property
  def scale(self) -> float:
    return self.attention_scale or self.head_dim**-0.5

  @property
  def map_shapes(self) -> dict[str, tuple[int, int]]:
    """(D_in, D_out) of every map."""
    queries, keys = self.heads * self.head_dim, self.groups * self.head_dim
    shapes = {
      "q": (self.width, queries),
      "k": (self.width, keys),
      "v": (self.width, keys),
      "o": (queries, self.width),
      "gate": (self.width, self.hidden),
      "up": (self.width, self.hidden),
      "down": (self.hidden, self.width),
    }
    return {name: shapes[name] for name in self.maps}

  def has_bias(self, name: str) -> bool:
    if name in ("q", "k", "v"):
      return self.qkv_bias
    return self.output_bias if name == "o" else self.feed_forward_bias

  def network(self, base_parameters: int = 0) -> sizing.Network:
    """The shapes that an adapter's parameter count depends on."""
    maps = tuple((name, *self.map_shapes[name]) for name in self.adapted_maps)
    return sizing.Network(maps, self.layers, self.blocks, self.width, base_parameters)


class Output(NamedTuple):
  """`hidden` [B, T, D] after the last norm, what the blocks routed, and the extended cache."""

  hidden: Array
  routing: routing_lib.RoutingRecord
  cache: attention.Cache | None


class Context(NamedTuple):
  """What all layers share: masks, rotations [Z, B, T, K/2], and each layer's choice of them."""

  mask: attention.MaskInfo
  cos: Array | None
  sin: Array | None
  layer_ropes: Array
  start: Array | None  # first cache slot of the new tokens


_AXES = {
  "q": ("embed", "heads"),
  "k": ("embed", "kv_heads"),
  "v": ("embed", "kv_heads"),
  "o": ("heads", "embed"),
  "gate": ("embed", "mlp"),
  "up": ("embed", "mlp"),
  "down": ("mlp", "embed"),
}


class Layer(nn.Module):
  """One transformer layer, of the stack's longer form."""

  config: DecoderConfig
  adapter: adapter_config.AdapterConfig

  def setup(self):
    cfg = self.config

    def norm(width=cfg.width, axis="embed"):
      return norms.Norm(cfg.norm, width, cfg.norm_epsilon, cfg.base_dtype, axis)

    self.attention_norm, self.feed_forward_norm = norm(), norm()
    if cfg.post_norms:
      self.attention_post_norm, self.feed_forward_post_norm = norm(), norm()
    if cfg.qk_norm:
      self.q_norm, self.k_norm = norm(cfg.head_dim, "head_dim"), norm(cfg.head_dim, "head_dim")
    self.q, self.k, self.v, self.o = (self._map(name) for name in ("q", "k", "v", "o"))
    self.mlp = feed_forward.FeedForward(self._unbound_map, cfg.activation, cfg.gated)

  def _unbound_map(self, name: str) -> dense.AdaptedDense:
    cfg = self.config
    adapter = self.adapter if name in cfg.adapted else _NO_ADAPTER
    return dense.AdaptedDense(
      adapter,
      name,
      *cfg.map_shapes[name],
      _AXES[name],
      cfg.has_bias(name),
      cfg.base_dtype,
      parent=None,
    )

  def _map(self, name: str) -> dense.AdaptedDense:
    return self._unbound_map(name)

  def anchor_state(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T R"]:
    """z of the first adapted map; see `adapters/block.py`."""
    anchor = self.config.adapted_maps[0]
    if anchor in ("q", "k", "v"):
      return getattr(self, anchor).low_rank_state(self.attention_norm(hidden))
    if anchor in ("gate", "up"):
      return getattr(self.mlp, anchor).low_rank_state(self.feed_forward_norm(hidden))
    raise errors.UserError(
      f"adapter.history: 'output' needs an adapted map that reads the layer's input, not {anchor!r}"
      "; use 'routed' or adapt one of q, k, v, gate, up"
    )

  @typed
  def __call__(
    self,
    hidden: Float[Array, "B T D"],
    routing: routing_lib.BlockRouting | None,
    shared: memory.Shared,
    context: Context,
    cache: tuple[Array, Array] | None,
    place: tuple[Array | int, int],
  ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None, tuple[routing_lib.Routing, ...]]:
    """The hidden state after the layer, the cache, and the routings that its branches made.

    Args:
      hidden: the state before it.
      routing: of the block, or None.
      shared: the network's shared parameters.
      context: masks and rotations of all layers.
      cache: keys and values [L, B, C, G, K], or None.
      place: index of the block, and slot of the layer in it.
    """
    cfg = self.config
    index = place[0] * cfg.layers_per_block + place[1]
    x, routings = self.attention_norm(hidden), []
    low_rank = dense.project(x, (self.q, self.k, self.v))

    def heads(module):
      y, routed = module(x, routing, shared, low_rank.get(module.map_name))
      routings.append(routed)
      y = y.reshape(*y.shape[:2], -1, cfg.head_dim)
      return sharding.constrain(y, "batch", None, module.axes[1], None)

    query, key, value = heads(self.q), heads(self.k), heads(self.v)
    if cfg.qk_norm:
      query, key = self.q_norm(query), self.k_norm(key)
    if context.cos is not None:
      kind = context.layer_ropes[index] if len(cfg.ropes) > 1 else 0
      cos, sin = context.cos[kind], context.sin[kind]
      query, key = rope.rotate(query, cos, sin), rope.rotate(key, cos, sin)
    if cache is not None:
      cache, key, value = attention.store(cache, index, context.start, key, value)
      key, value = key.astype(query.dtype), value.astype(query.dtype)
    mixed = fast_attention.attend(
      cfg.attention,
      query,
      key,
      value,
      context.mask,
      scale=cfg.scale,
      windows=(cfg.layer_windows or (0,) * cfg.layers)[place[1] :: cfg.layers_per_block],
      place=place[0],
      soft_cap=cfg.attention_soft_cap,
      cached=cache is not None,
    )
    update, routed = self.o(mixed.reshape(*hidden.shape[:2], -1), routing, shared)
    update = sharding.tokens(update)
    hidden = hidden + (self.attention_post_norm(update) if cfg.post_norms else update)
    update, mlp_routings = self.mlp(self.feed_forward_norm(hidden), routing, shared)
    update = sharding.tokens(update)
    hidden = hidden + (self.feed_forward_post_norm(update) if cfg.post_norms else update)
    routings = (*routings, routed, *mlp_routings)
    return hidden, cache, tuple(routed for routed in routings if routed is not None)


class Decoder(nn.Module):
  """Tokens to hidden states; `logits` makes scores of those that are asked for."""

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
      # Zeros, so that the adapted network starts as its base whatever the instruction is.
      self.instruction_input = self.param(
        "instruction_input",
        nn.with_logical_partitioning(nn.initializers.zeros, ("instruction", "embed")),
        (self.adapter.instruction_dim, cfg.width),
      )
    self.stack = block.BlockStack(
      self.adapter,
      functools.partial(Layer, cfg, self.adapter),
      cfg.blocks,
      cfg.layers_per_block,
      tuple((name, cfg.map_shapes[name][1], _AXES[name][1]) for name in cfg.adapted_maps),
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
      positions: [B, T] place in its own text; 0, 1, .. unless told.
      segments: [B, T] which text a token belongs to, `attention.PADDING` for padding; one text
        a row unless told.
      instruction: embedding [B, E] a row or [B, T, E] a token, or None.
      cache: keys and values of the tokens before; the new ones are added.
    """
    cfg, (batch, length) = self.config, tokens.shape
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if segments is None:
      segments = jnp.ones((batch, length), jnp.int32)
    hidden = jnp.take(self.embedding.value, tokens, axis=0).astype(cfg.dtype)
    # The rows are fetched in the table's own split of their width, then the batch takes its place.
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
    start, kept = None, None
    keys = (positions, segments)
    if cache is not None:
      start, kept = cache.length, (cache.keys, cache.values)
      cache = attention.extend(cache, positions, segments)
      keys = (cache.positions, cache.segments)
    context = Context(
      attention.MaskInfo(positions, keys[0], segments, keys[1]),
      cos,
      sin,
      jnp.asarray(cfg.layer_ropes or (0,) * cfg.layers, jnp.int32),
      start,
    )
    hidden, routing, kept = self.stack(hidden, instruction, context, kept)
    if cache is not None:
      cache = cache._replace(keys=kept[0], values=kept[1])
    return Output(self.norm(hidden), routing, cache)

  def output_table(self, dtype: jnp.dtype) -> Array:
    """What `logits` multiplies by: [V, D] when tied, else [D, V]; whole but for its vocabulary."""
    if self.config.tied:
      return sharding.constrain(self.embedding.value.astype(dtype), "vocabulary", None)
    return sharding.constrain(self.head.value.astype(dtype), None, "vocabulary")

  def logits(self, hidden: Array, table: Array | None = None) -> Array:
    """Scores float32 [*batch, V] of hidden states [*batch, D].

    Args:
      hidden: as in `Output`.
      table: `output_table`, for callers that make logits of many parts.
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
    """Logits [B, T, V] of every position, and the `Output`; for short texts and tests."""
    output = self(*arguments, **options)
    return self.logits(output.hidden), output

  def initialise(self, tokens: Array, instruction: Array | None = None) -> Any:
    """Touches every variable once, for `init`."""
    return self.logits(self(tokens, instruction=instruction).hidden[:, -1:])


def abstract(
  config: DecoderConfig, adapter: adapter_config.AdapterConfig = _NO_ADAPTER
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
