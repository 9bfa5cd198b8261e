"""WordLlama against an independent NumPy mean over the same table."""

import numpy as np
import pytest
import safetensors
import tokenizers

from qlora_jax.instructions import wordllama

TEXTS = ["Write the plural form of the word.", "a", "日本語 with bytes 😀", "long " * 700]


@pytest.fixture(scope="module")
def encode():
  return wordllama.load()


def test_embedding_is_the_normalised_mean_of_token_vectors(encode):
  weights, tokenizer_file = wordllama.files()
  with safetensors.safe_open(weights, "np") as file:
    table = file.get_tensor("embedding.weight").astype(np.float64)
  tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
  expected = []
  for text in TEXTS:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    total = sum(table[i] for i in ids)
    expected.append(total / np.sqrt(total @ total))
  np.testing.assert_allclose(encode(TEXTS), expected, atol=1e-6)  # float32 sums


def test_long_texts_are_not_cut(encode):
  start = "number " * 600
  a, b = encode([start + "cat", start + "dog " * 50])
  assert not np.allclose(a, b, atol=1e-3)


def test_a_text_encodes_the_same_alone_and_in_a_batch(encode):
  np.testing.assert_array_equal(encode(TEXTS)[1:2], encode(TEXTS[1:2]))


def test_a_text_without_tokens_gives_zeros(encode):
  np.testing.assert_array_equal(encode([""]), np.zeros((1, wordllama.DIM), np.float32))
  assert encode([]).shape == (0, wordllama.DIM)


def test_one_bare_string_is_refused(encode):
  with pytest.raises(TypeError, match="sequence"):
    encode("a text")
