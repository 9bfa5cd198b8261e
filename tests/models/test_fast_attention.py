"""TPU and GPU attention against the reference: masks, windows, caps, KV heads, gradients."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qlora_jax import errors
from qlora_jax.models import attention, fast_attention

HEADS, GROUPS, WIDTH = 4, 2, 8
SEGMENTS = np.array([[1] * 50 + [2] * 31 + [3] * 40 + [0] * 9, [1] * 130], np.int32)


def inputs(length=130):
  rng = np.random.default_rng(0)
  shapes = ((2, length, HEADS, WIDTH), (2, length, GROUPS, WIDTH), (2, length, GROUPS, WIDTH))
  query, key, value = (rng.normal(size=shape).astype("f") for shape in shapes)
  segments = SEGMENTS[:, :length]
  starts = np.array([[np.argmax(row == one) for one in row] for row in segments])
  positions = (np.arange(length) - starts).astype(np.int32) * (segments > 0)
  mask = attention.MaskInfo(positions, positions, segments, segments)
  return (
    query,
    key,
    value,
    mask,
    rng.normal(size=shapes[0]).astype("f") * (segments > 0)[..., None, None],
  )


def both(function, query, key, value, weight):
  """Values at text tokens (zero at padding), and the gradients of a weighted sum."""

  def summed(query, key, value):
    mixed = function(query, key, value)
    return jnp.sum(mixed * weight), mixed * (weight != 0)

  (_, values), grads = jax.jit(jax.value_and_grad(summed, (0, 1, 2), has_aux=True))(
    query, key, value
  )
  return [values, *grads]


# The blocks sum float32 products in another order: a few units in the last place of sums near 10.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.mark.parametrize(("windows", "choice", "cap"), [((0,), 0, 0.0), ((0, 20), 1, 5.0)])
def test_splash_equals_the_reference_in_values_and_gradients(windows, choice, cap):
  query, key, value, mask, weight = inputs()
  expected = both(
    lambda q, k, v: attention.attention(
      q, k, v, mask, scale=0.3, window=windows[choice], soft_cap=cap
    ),
    query,
    key,
    value,
    weight,
  )
  actual = both(
    lambda q, k, v: fast_attention.splash(
      q,
      k,
      v,
      mask.query_segments,
      scale=0.3,
      windows=windows,
      choice=jnp.int32(choice),
      soft_cap=cap,
      interpret=True,
    ),
    query,
    key,
    value,
    weight,
  )
  for a, b in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("window", [0, 20])
def test_the_mask_for_cudnn_gives_the_reference(window):
  query, key, value, mask, weight = inputs()
  expected = both(
    lambda q, k, v: attention.attention(q, k, v, mask, scale=0.3, window=window),
    query,
    key,
    value,
    weight,
  )
  actual = both(
    lambda q, k, v: fast_attention.cudnn(
      q, k, v, mask, scale=0.3, window=jnp.int32(window), implementation="xla"
    ),
    query,
    key,
    value,
    weight,
  )
  for a, b in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize(
  ("platform", "changed", "expected"),
  [
    ("cpu", {}, "reference"),
    ("tpu", {}, "splash"),
    ("tpu", {"soft_cap": 30.0}, "splash"),
    ("tpu", {"cached": True}, "reference"),
    ("tpu", {"kind": "reference"}, "reference"),
    ("gpu", {}, "cudnn"),
    ("gpu", {"dtype": jnp.float32}, "reference"),
    ("gpu", {"soft_cap": 30.0}, "reference"),
    ("gpu", {"head_dim": 256}, "reference"),
    ("gpu", {"length": 127}, "reference"),
    ("cpu", {"kind": "splash"}, "splash"),  # a program can be compiled for another machine
  ],
)
def test_the_platform_chooses_the_attention(platform, changed, expected):
  options = {
    "kind": "auto",
    "cached": False,
    "dtype": jnp.bfloat16,
    "head_dim": 128,
    "length": 128,
    "soft_cap": 0.0,
  } | changed
  assert fast_attention.choose(options.pop("kind"), platform, **options) == expected


def test_an_attention_of_another_platform_is_refused_in_one_line():
  for kind, platform in (("auto", "cpu"), ("reference", "tpu"), ("splash", "tpu")):
    fast_attention.check(kind, platform)
  with pytest.raises(errors.UserError, match=r"model.attention: 'splash' needs a TPU, not a CPU"):
    fast_attention.check("splash", "cpu")
