"""Which attention runs where, chosen in one place (`choose`), and the fast ones.

  reference  `attention.attention`: any platform, any mask, and always with a cache
  splash     TPU: a blockwise Pallas kernel; no [T, T] scores, and blocks that a causal or local
             mask empties are skipped
  cudnn      GPU: cuDNN's fused attention through `jax.nn.dot_product_attention`

Rows are those of training: a segment's tokens lie side by side with positions 0, 1, .., so that
distances between slots are distances between positions. Padding sees what it likes. Letters as in
`qlora_jax/typing.py`.
"""

import functools
import math
from collections.abc import Sequence

import jax
from jax import numpy as jnp

from qlora_jax import errors
from qlora_jax.models import attention
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array

KINDS = ("auto", "reference", "splash", "cudnn")
_PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}
_LANES = 128  # a TPU's: lengths are padded to it
_BLOCK = 512  # tokens of a block of splash attention, at most


def check(kind: str, platform: str) -> None:
  """Raises a UserError if a kind that is asked for by name cannot run on a platform."""
  needed = _PLATFORMS.get(kind, platform)
  if needed != platform:
    raise errors.UserError(
      f"model.attention: {kind!r} needs a {needed.upper()}, not a {platform.upper()};"
      " use 'auto' or 'reference'"
    )


def platform() -> str:
  """Of the mesh in use, whose devices may be another machine's, or of this process."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


def choose(
  kind: str,
  platform: str,
  *,
  cached: bool,
  dtype: jnp.dtype,
  head_dim: int,
  length: int,
  soft_cap: float,
) -> str:
  """'reference', 'splash' or 'cudnn' for one attention; a kind asked for by name is kept.

  Args:
    kind: of `KINDS`.
    platform: 'cpu', 'gpu' or 'tpu'.
    cached: whether keys come from a cache.
    dtype: of queries and keys.
    head_dim, length: K and T.
    soft_cap: of the scores.
  """
  if cached or kind == "reference":
    return "reference"
  if kind != "auto":
    return kind
  if platform == "tpu":
    return "splash"
  half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
  # cuDNN: half precision, no cap, even lengths with a mask, heads up to 128 (256 on Hopper).
  if platform == "gpu" and half and not soft_cap and head_dim <= 128:
    return "cudnn" if head_dim % 8 == 0 and length % 2 == 0 else "reference"
  return "reference"


def attend(
  kind: str,
  query: Array,
  key: Array,
  value: Array,
  mask: attention.MaskInfo,
  *,
  scale: float,
  windows: Sequence[int],
  place: Array | int,
  soft_cap: float,
  cached: bool,
) -> Array:
  """Attention [B, T, H, K] of one layer by the implementation that `choose` names.

  Args:
    kind: of `KINDS`.
    query, key, value, mask, scale, soft_cap: as for `attention.attention`.
    windows: of the layers that are compiled as this one (the same slot of every block).
    place: index of this layer among them, which may be traced.
    cached: whether keys come from a cache.
  """
  length, head_dim = query.shape[1], query.shape[-1]
  chosen = choose(
    kind,
    platform(),
    cached=cached,
    dtype=query.dtype,
    head_dim=head_dim,
    length=length,
    soft_cap=soft_cap,
  )
  if chosen == "splash":
    kinds = sorted(set(windows))
    choice = jnp.asarray([kinds.index(window) for window in windows])[place]
    return splash(
      query,
      key,
      value,
      mask.query_segments,
      scale=scale,
      windows=kinds,
      choice=choice,
      soft_cap=soft_cap,
    )
  window = windows[0] if len(set(windows)) == 1 else jnp.asarray(windows, jnp.int32)[place]
  if chosen == "cudnn":
    if soft_cap:
      raise errors.UserError("model.attention: cuDNN has no soft cap on scores; use 'reference'")
    return cudnn(query, key, value, mask, scale=scale, window=window)
  return attention.attention(query, key, value, mask, scale=scale, window=window, soft_cap=soft_cap)


def cudnn(
  query: Array,
  key: Array,
  value: Array,
  mask: attention.MaskInfo,
  *,
  scale: float,
  window: Array | int = 0,
  implementation: str = "cudnn",
) -> Array:
  """Fused attention [B, T, H, K] on a GPU; `implementation='xla'` is the same mask on any device.

  Raises:
    UserError: cuDNN cannot run these shapes or this precision; says which.
  """
  seen = attention.visible(mask, window)[:, None]  # [B, 1, T, C]
  try:
    return jax.nn.dot_product_attention(
      query, key, value, mask=seen, scale=scale, implementation=implementation
    )
  except (NotImplementedError, RuntimeError) as error:
    raise errors.UserError(
      f"model.attention: cuDNN refuses it: {' '.join(str(error).split())}; use 'reference'"
    ) from error


def splash(
  query: Array,
  key: Array,
  value: Array,
  segments: Array,
  *,
  scale: float,
  windows: Sequence[int] = (0,),
  choice: Array | int = 0,
  soft_cap: float = 0.0,
  interpret: bool = False,
) -> Array:
  """Blockwise causal attention [B, T, H, K] within segments [B, T].

  On a mesh each device takes its own rows and heads; where the mesh splits heads finer than there
  are key heads, those are repeated first.

  Args:
    query, key, value: [B, T, H, K] and twice [B, T, G, K].
    segments: int32, which text each token belongs to.
    scale: factor on the scores.
    windows: the kinds of layers: keys that a token sees, 0 for all before.
    choice: index into `windows`, which may be traced.
    soft_cap: c of c tanh(score / c), 0 for none.
    interpret: runs the kernel's program on any device, slowly.
  """
  length, heads = query.shape[1:3]
  found = sharding.current()
  if found is not None:
    split = found[0]["tensor"]
    repeats = split // math.gcd(key.shape[2], split)
    if repeats > 1 and heads % (key.shape[2] * repeats) == 0:
      key, value = (jnp.repeat(each, repeats, axis=2) for each in (key, value))
  padded = -(-length // _LANES) * _LANES
  block = next(size for size in (_BLOCK, _BLOCK // 2, _LANES) if padded % size == 0)

  def pad(x):  # [B, T, H, K] to [B, H, T', K]; what is added has a segment of its own
    return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))), 1, 2)

  segments = jnp.pad(segments, ((0, 0), (0, padded - length)), constant_values=attention.EMPTY)

  from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

  def own(query, key, value, segments, choice):
    def kind(window):
      kernel = _kernel(query.shape[1], padded, window, block, soft_cap, interpret)

      def row(query, key, value, segments):
        return kernel(query, key, value, segment_ids=splash_lib.SegmentIds(segments, segments))

      return jax.vmap(row)

    kinds = [kind(window) for window in windows]
    if len(kinds) == 1:
      return kinds[0](query, key, value, segments)
    return jax.lax.switch(choice, kinds, query, key, value, segments)

  arguments = (pad(query * scale), pad(key), pad(value), segments, jnp.asarray(choice))
  own = _settled(own)
  if found is not None:
    own = _sharded(own, found, arguments)
  mixed = own(*arguments)
  return jnp.swapaxes(mixed, 1, 2)[:, :length].astype(query.dtype)


def _settled(function):
  """The function of (query, key, value, segments, choice), whose gradient keeps nothing half done.

  The kernel leaves the logarithms of its sums with 128 equal lanes a query, and slices them. Left
  alone, the TPU compiler may slice them when the gradient asks, and hold twice the bytes of the
  queries until then: here nothing reads the result before.
  """

  @jax.custom_vjp
  def run(*arguments):
    return function(*arguments)

  def forward(query, key, value, *rest):
    def differentiated(query, key, value):
      return function(query, key, value, *rest)

    return jax.lax.optimization_barrier(jax.vjp(differentiated, query, key, value))

  def backward(pull, grad):
    return (*pull(grad), None, None)

  run.defvjp(forward, backward)
  return run


def _sharded(function, found, arguments):
  """The function over each device's own rows and heads of [B, H, T, K]."""
  query, key, _, segments, _ = arguments
  of_key = sharding.spec(key.shape, ("batch", "kv_heads", None, None), *found)
  of_query = sharding.spec(query.shape, ("batch", "heads", None, None), *found)
  if of_key[1:2] != of_query[1:2]:  # heads that cannot be split alike stay whole
    of_key = of_query = sharding.spec(query.shape, ("batch", None, None, None), *found)
  of_row = sharding.spec(segments.shape, ("batch", None), *found)
  whole = jax.sharding.PartitionSpec()
  return jax.shard_map(
    function,
    in_specs=(of_query, of_key, of_key, of_row, whole),
    out_specs=of_query,
    check_vma=False,  # a Pallas call does not say over which axes its result varies
  )


@functools.lru_cache(maxsize=64)
def _masks(heads: int, length: int, window: int):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

  shape = (length, length)
  # The window counts the token itself: keys at distances 0 .. window - 1.
  mask = splash_lib.LocalMask(shape, (window - 1, 0), 0) if window else splash_lib.CausalMask(shape)
  return splash_lib.MultiHeadMask([mask] * heads)


def _kernel(heads, length, window, block, soft_cap, interpret):
  # Imported where it is used: Pallas takes seconds to import, and most machines have no TPU.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

  sizes = splash_lib.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  return splash_lib.make_splash_mha(
    _masks(heads, length, window),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=soft_cap or None,
    interpret=interpret,
  )
