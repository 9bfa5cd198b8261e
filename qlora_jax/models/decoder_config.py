"""The config of a decoder: shape, kind, and the maps that get an adapter.

A family is one such config, see `families.py`. Letters as in `qlora_jax/typing.py`.
"""

import dataclasses

from qlora_jax import errors
from qlora_jax.adapters import block, sizing
from qlora_jax.models import fast_attention, feed_forward, norms, rope

MAPS = ("q", "k", "v", "o", "gate", "up", "down")
DTYPES = ("float32", "bfloat16")
# Logical axes (D_in, D_out) of each map's kernel.
MAP_AXES = {
  "q": ("embed", "heads"),
  "k": ("embed", "kv_heads"),
  "v": ("embed", "kv_heads"),
  "o": ("heads", "embed"),
  "gate": ("embed", "mlp"),
  "up": ("embed", "mlp"),
  "down": ("mlp", "embed"),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Shape and kind of a decoder. Hashable, so that it can be the key of a compiled step.

  Attributes:
    vocabulary: V.
    width, hidden: D and F.
    layers, layers_per_block: L and S; S must divide L.
    heads, groups, head_dim: H, G (key/value heads) and K; G must divide H.
    norm: one of `norms.KINDS`.
    norm_epsilon: added to the mean square or the variance, under the root.
    post_norms: also normalises the outputs of attention and feed-forward (Gemma).
    qk_norm: normalises each head of queries and keys (Qwen3, Gemma 3).
    activation, gated: of the feed-forward network.
    qkv_bias, output_bias, feed_forward_bias: which maps have a bias.
    learned_positions: rows of the learned position table (GPT-2); 0 means rotary positions.
    ropes: the Z kinds of rotary embedding.
    layer_ropes: index into `ropes` of each layer; empty: every layer uses the first.
    layer_windows: number of keys that each layer sees; 0 means all earlier keys; empty: all 0.
    attention_scale: factor on q k^T; 0 means 1/sqrt(K).
    attention_soft_cap, logit_soft_cap: c of c tanh(x / c); 0 means no cap.
    embedding_scale: factor on token embeddings.
    tied: the embedding is also the output head.
    max_length: context of the base, in tokens.
    adapted: the maps that get an adapter, a subset of `MAPS`.
    base_dtype: dtype of the stored base.
    dtype: dtype of the activations.
    unroll: a Python loop over the blocks instead of the scan.
    remat: a key of `block.REMAT`.
    attention: one of `fast_attention.KINDS`; 'auto' chooses by platform.

  Raises:
    UserError: a size below 1, sizes that do not divide, an unknown map or an unknown kind.
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
    unknown_maps = [name for name in self.adapted if name not in self.maps]
    if unknown_maps:
      raise errors.UserError(
        f"model.adapted: this model has no map {', '.join(map(repr, unknown_maps))};"
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
    """The adapted maps of a layer, in the order in which they run; the first is the anchor."""
    return tuple(name for name in self.maps if name in self.adapted)

  @property
  def scale(self) -> float:
    """Factor on q k^T."""
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
    """The shapes that determine an adapter's parameter count."""
    maps = tuple((name, *self.map_shapes[name]) for name in self.adapted_maps)
    return sizing.Network(maps, self.layers, self.blocks, self.width, base_parameters)
