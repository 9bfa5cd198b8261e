"""One transformer layer of the decoder: attention and feed-forward, every map in an adapter slot.

`adapters/block.py` scans it over the blocks. Letters as in `qlora_jax/typing.py`.
"""

from typing import NamedTuple

from flax import linen as nn

from qlora_jax import errors
from qlora_jax.adapters import config as adapter_config
from qlora_jax.adapters import dense, memory
from qlora_jax.adapters import routing as routing_lib
from qlora_jax.models import attention, decoder_config, fast_attention, feed_forward, norms, rope
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array, Float, typed

NO_ADAPTER = adapter_config.AdapterConfig(family="none")


class Context(NamedTuple):
  """Values that all layers share.

  Attributes:
    mask: positions and segments of queries and keys.
    cos, sin: rotations float32 [Z, B, T, K/2]; None with learned positions.
    layer_ropes: int32 [L], the kind of rotation of each layer.
    start: first cache slot of the new tokens; None without a cache.
  """

  mask: attention.MaskInfo
  cos: Array | None
  sin: Array | None
  layer_ropes: Array
  start: Array | None


class Layer(nn.Module):
  """One transformer layer.

  `BlockStack` calls it in its longer form: with a context, a cache and the layer's place.

  Attributes:
    config: of the decoder.
    adapter: of the adapted maps.
  """

  config: decoder_config.DecoderConfig
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
    self.q, self.k, self.v, self.o = (self._unbound_map(name) for name in ("q", "k", "v", "o"))
    self.mlp = feed_forward.FeedForward(self._unbound_map, cfg.activation, cfg.gated)

  def _unbound_map(self, name: str) -> dense.AdaptedDense:
    cfg = self.config
    return dense.AdaptedDense(
      self.adapter if name in cfg.adapted else NO_ADAPTER,
      name,
      *cfg.map_shapes[name],
      decoder_config.MAP_AXES[name],
      cfg.has_bias(name),
      cfg.base_dtype,
      parent=None,
    )

  def anchor_state(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T R"]:
    """The low-rank state [B, T, R] of the anchor map, from the layer's input [B, T, D].

    Raises:
      UserError: the anchor map does not read the layer's input.
    """
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
    """The hidden state after the layer, the cache, and the routings of the maps with a router.

    Args:
      hidden: the state before the layer.
      routing: of the block, or None.
      shared: the network's shared parameters.
      context: masks and rotations of all layers.
      cache: keys and values of all layers, or None.
      place: index of the block, and slot of the layer in it.
    """
    cfg = self.config
    index = place[0] * cfg.layers_per_block + place[1]
    x, projection_routings = self.attention_norm(hidden), []
    low_rank = dense.project(x, (self.q, self.k, self.v))

    def heads(module):
      y, map_routing = module(x, routing, shared, low_rank.get(module.map_name))
      projection_routings.append(map_routing)
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
    update, output_routing = self.o(mixed.reshape(*hidden.shape[:2], -1), routing, shared)
    update = sharding.tokens(update)
    hidden = hidden + (self.attention_post_norm(update) if cfg.post_norms else update)
    update, mlp_routings = self.mlp(self.feed_forward_norm(hidden), routing, shared)
    update = sharding.tokens(update)
    hidden = hidden + (self.feed_forward_post_norm(update) if cfg.post_norms else update)
    map_routings = (*projection_routings, output_routing, *mlp_routings)
    return hidden, cache, tuple(routed for routed in map_routings if routed is not None)
