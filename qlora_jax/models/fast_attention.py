"""The choice of the attention implementation (`choose`), and the fast implementations.

  reference  `attention.attention`: any platform, any mask, and always with a cache
  splash     TPU: a blockwise Pallas kernel; it makes no [T, T] scores, and skips blocks that a
             causal or local mask empties
  cudnn      GPU: cuDNN's fused attention through `jax.nn.dot_product_attention`

The fast implementations expect rows of training: the tokens of a segment are adjacent, at positions
0, 1, .., so that distances between slots equal distances between positions. The outputs of padding
tokens are undefined. Letters as in `qlora_jax/typing.py`.
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
_LANES = 128  # lanes of a TPU; lengths are padded to a multiple
_BLOCK = 512  # maximum tokens per block of splash attention


def check(kind: str, platform: str) -> None:
  """Raises a UserError if an explicitly named kind cannot run on the platform."""
  needed = _PLATFORMS.get(kind, platform)
  if needed != platform:
    raise errors.UserError(
      f"model.attention: {kind!r} needs a {needed.upper()}, not a {platform.upper()};"
      " use 'auto' or 'reference'"
    )


def platform() -> str:
  """The platform of the current mesh if there is one, else JAX's default backend.

  The devices of the mesh may be on another machine.
  """
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
  """The implementation of one attention: 'reference', 'splash' or 'cudnn'.

  Without a cache, a kind other than 'auto' is returned unchanged.

  Args:
    kind: one of `KINDS`.
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
  half_precision = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
  # cuDNN: half precision, no cap, even lengths with a mask, heads up to 128 (256 on Hopper).
  if platform == "gpu" and half_precision and not soft_cap and head_dim <= 128:
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
  """Attention [B, T, H, K] of one layer, by the implementation that `choose` returns.

  Args:
    kind: one of `KINDS`.
    query, key, value, mask, scale, soft_cap: as for `attention.attention`.
    windows: window of each layer that shares this compiled program (the same slot of every block).
    place: index of this layer in `windows`; may be traced.
    cached: whether keys come from a cache.

  Raises:
    UserError: cuDNN cannot run these shapes, this precision or a soft cap.
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
    distinct = sorted(set(windows))
    choice = jnp.asarray([distinct.index(window) for window in windows])[place]
    return splash(
      query,
      key,
      value,
      mask.query_segments,
      scale=scale,
      windows=distinct,
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
  """Fused attention [B, T, H, K] on a GPU.

  `implementation='xla'` computes the same with the same mask on any device.

  Raises:
    UserError: cuDNN cannot run these shapes or this precision; the message gives cuDNN's reason.
  """
  visible = attention.visible(mask, window)[:, None]  # [B, 1, T, C]
  try:
    return jax.nn.dot_product_attention(
      query, key, value, mask=visible, scale=scale, implementation=implementation
    )
  except (NotImplementedError, RuntimeError) as error:
    raise errors.UserError(
      f"model.attention: cuDNN reports: {' '.join(str(error).split())}; use 'reference'"
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

  On a mesh each device computes its shard of the rows and heads. If the tensor axis does not divide
  the KV heads, they are repeated first.

  Args:
    query: [B, T, H, K].
    key, value: [B, T, G, K].
    segments: int32, the text that each token belongs to.
    scale: factor on the scores.
    windows: the distinct windows: the number of keys that a token sees, 0 for all earlier keys.
    choice: index into `windows`; may be traced.
    soft_cap: c of c tanh(score / c), 0 for no cap.
    interpret: runs the kernel in Pallas' interpreter, on any device but slowly.
  """
  length, heads = query.shape[1:3]
  mesh_and_rules = sharding.current()
  if mesh_and_rules is not None:
    tensor = mesh_and_rules[0]["tensor"]
    repeats = tensor // math.gcd(key.shape[2], tensor)
    if repeats > 1 and heads % (key.shape[2] * repeats) == 0:
      key, value = jnp.repeat(key, repeats, axis=2), jnp.repeat(value, repeats, axis=2)
  padded = -(-length // _LANES) * _LANES
  block = next(size for size in (_BLOCK, _BLOCK // 2, _LANES) if padded % size == 0)

  def pad(x):  # [B, T, H, K] to [B, H, T', K]; T' is the padded length
    return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))), 1, 2)

  # Padding to whole lanes is a separate segment, so that no token sees it.
  segments = jnp.pad(segments, ((0, 0), (0, padded - length)), constant_values=attention.EMPTY)

  from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

  def attend_rows(query, key, value, segments, choice):
    def with_window(window):
      kernel = _kernel(query.shape[1], padded, window, block, soft_cap, interpret)

      def row(query, key, value, segments):
        return kernel(query, key, value, segment_ids=splash_lib.SegmentIds(segments, segments))

      return jax.vmap(row)

    kernels = [with_window(window) for window in windows]
    if len(kernels) == 1:
      return kernels[0](query, key, value, segments)
    return jax.lax.switch(choice, kernels, query, key, value, segments)

  arguments = (pad(query * scale), pad(key), pad(value), segments, jnp.asarray(choice))
  run = _with_barrier(attend_rows)
  if mesh_and_rules is not None:
    run = _sharded(run, mesh_and_rules, arguments)
  mixed = run(*arguments)
  return jnp.swapaxes(mixed, 1, 2)[:, :length].astype(query.dtype)


def _with_barrier(function):
  """The same function of (query, key, value, segments, choice), with smaller residuals.

  The kernel returns the log-sum-exp of each query in 128 equal lanes and slices them to one. The
  TPU compiler may delay that slice until the backward pass and keep all lanes until then, which
  takes twice the bytes of the queries. The barrier forces the slice before the result is used.
  """

  @jax.custom_vjp
  def run(*arguments):
    return function(*arguments)

  def forward(query, key, value, *rest):
    def differentiated(query, key, value):
      return function(query, key, value, *rest)

    return jax.lax.optimization_barrier(jax.vjp(differentiated, query, key, value))

  def backward(vjp, grad):
    return (*vjp(grad), None, None)

  run.defvjp(forward, backward)
  return run


def _sharded(function, mesh_and_rules, arguments):
  """The function under `shard_map`: each device has a shard of the rows and heads [B, H, T, K]."""
  query, key, _, segments, _ = arguments
  key_spec = sharding.spec(key.shape, ("batch", "kv_heads", None, None), *mesh_and_rules)
  query_spec = sharding.spec(query.shape, ("batch", "heads", None, None), *mesh_and_rules)
  if key_spec[1:2] != query_spec[1:2]:  # the heads cannot be split the same way: do not split them
    key_spec = query_spec = sharding.spec(query.shape, ("batch", None, None, None), *mesh_and_rules)
  segment_spec = sharding.spec(segments.shape, ("batch", None), *mesh_and_rules)
  replicated = jax.sharding.PartitionSpec()
  return jax.shard_map(
    function,
    in_specs=(query_spec, key_spec, key_spec, segment_spec, replicated),
    out_specs=query_spec,
    check_vma=False,  # a Pallas call does not declare the mesh axes over which its result varies
  )


@functools.lru_cache(maxsize=64)
def _masks(heads: int, length: int, window: int):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

  shape = (length, length)
  # The window includes the token itself: keys at distances 0 .. window - 1.
  mask = splash_lib.LocalMask(shape, (window - 1, 0), 0) if window else splash_lib.CausalMask(shape)
  return splash_lib.MultiHeadMask([mask] * heads)


def _kernel(heads, length, window, block, soft_cap, interpret):
  # Imported here, because Pallas takes seconds to import and most machines have no TPU.
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
