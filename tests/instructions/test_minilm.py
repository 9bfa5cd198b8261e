"""MiniLM in JAX against an independent NumPy forward pass, and its behaviour as an encoder."""

import math

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from qlora_jax.instructions import minilm

SENTENCES = [
  "Write the plural form of the word.",
  "a",
  "Translate the following English word to German, keeping its article; then stop, please!",
]


@pytest.fixture(scope="module")
def encode():
  return minilm.load()


def _reference(weights, ids):
  """One sentence without padding, in float64, heads in a Python loop: [T] -> [D]."""
  w = {name: value.astype(np.float64) for name, value in weights.items() if "ids" not in name}
  erf = np.vectorize(math.erf)

  def dense(name, x):
    return x @ w[name + ".weight"].T + w[name + ".bias"]

  def norm(name, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    return x * w[name + ".weight"] + w[name + ".bias"]

  x = w["embeddings.word_embeddings.weight"][ids]
  x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
  x = norm("embeddings.LayerNorm", x + w["embeddings.token_type_embeddings.weight"][0])
  for index in range(6):
    prefix = f"encoder.layer.{index}."
    q, k, v = (dense(f"{prefix}attention.self.{part}", x) for part in ("query", "key", "value"))
    heads = []
    for head in range(12):
      part = slice(32 * head, 32 * head + 32)
      scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(32))
      heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
    attended = dense(prefix + "attention.output.dense", np.concatenate(heads, -1))
    x = norm(prefix + "attention.output.LayerNorm", x + attended)
    hidden = dense(prefix + "intermediate.dense", x)
    hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
    x = norm(prefix + "output.LayerNorm", x + dense(prefix + "output.dense", hidden))
  mean = x.mean(0)
  return mean / np.linalg.norm(mean)


def test_forward_matches_numpy_float64(encode):
  weights = safetensors_numpy.load_file(minilm.files()[0])
  tokenizer = minilm.load_tokenizer()
  expected = np.stack([_reference(weights, tokenizer.encode(text).ids) for text in SENTENCES])
  # Components are at most 1; the error of six float32 layers is about 1e-7.
  np.testing.assert_allclose(encode(SENTENCES), expected, atol=1e-5)


def test_parameter_tree_has_the_published_size():
  shapes = jax.tree.map(np.shape, minilm.load_params(), is_leaf=lambda x: hasattr(x, "shape"))
  assert shapes["tokens"] == (30522, 384)
  assert shapes["layers"]["up"] == {"kernel": (6, 384, 1536), "bias": (6, 1536)}
  count = sum(leaf.size for leaf in jax.tree.leaves(minilm.load_params()))
  # 22,713,216 published, without the unused pooler (384 * 385) and the second segment (384).
  assert count == 22_713_216 - 384 * 385 - 384


def test_a_text_encodes_the_same_alone_and_in_a_batch(encode):
  texts = SENTENCES + [f"Sort the {n} words." for n in range(5)]  # 8 texts: a larger batch
  together = encode(texts)
  alone = np.concatenate([encode([text]) for text in texts[:3]])
  np.testing.assert_allclose(together[:3], alone, atol=1e-6)


def test_padding_does_not_change_the_embedding():
  params = minilm.load_params()
  ids = minilm.load_tokenizer().encode(SENTENCES[0]).ids
  outputs = []
  for length in (16, 32):
    tokens = np.full((4, length), 7, np.int32)  # padding that is not token 0: the mask must hide it
    mask = np.zeros((4, length), np.float32)
    tokens[:, : len(ids)], mask[:, : len(ids)] = ids, 1
    outputs.append(np.asarray(minilm.forward(params, tokens, mask)))
  np.testing.assert_allclose(*outputs, atol=1e-6)


def test_rows_are_unit_float32_in_the_given_order(encode):
  texts = ["word " * 20, "cat", "word " * 20, ""]  # lengths that grouping reorders
  embeddings = encode(texts)
  assert embeddings.shape == (4, minilm.DIM) and embeddings.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
  np.testing.assert_array_equal(embeddings[0], embeddings[2])
  np.testing.assert_allclose(embeddings[1], encode(["cat"])[0], atol=1e-6)
  assert encode([]).shape == (0, minilm.DIM)


def test_encoding_needs_no_implicit_transfer(encode):
  with jax.transfer_guard("disallow"):
    encode(SENTENCES[:1])


def test_paraphrases_are_closer_than_other_instructions(encode):
  a, b, c, d = encode(
    [
      "Write the plural form of the word.",
      "Convert the noun to its plural.",
      "Translate the word into French.",
      "Give the French translation of the word.",
    ]
  )
  assert min(a @ b, c @ d) > max(a @ c, a @ d, b @ c, b @ d)


def test_tokenizer_cuts_at_256_tokens_and_keeps_the_end_token():
  tokenizer = minilm.load_tokenizer()
  assert len(tokenizer.encode("word " * 200).ids) == 202  # above the 128 of tokenizer.json
  encoded = tokenizer.encode("word " * 400)
  assert len(encoded.ids) == 256
  assert (encoded.tokens[0], encoded.tokens[-1]) == ("[CLS]", "[SEP]")


def test_batches_hold_every_text_once_in_known_shapes():
  lengths = np.random.default_rng(0).integers(2, 257, 200)
  batches = minilm._batches(lengths.tolist())
  assert sorted(index for _, rows in batches for index in rows) == list(range(200))
  for length, rows in batches:
    assert length in minilm.LENGTHS and len(rows) <= minilm.BATCHES[-1]
    assert max(lengths[rows]) <= length


def test_one_bare_string_is_refused(encode):
  with pytest.raises(TypeError, match="sequence"):
    encode("a text")
