"""The order of training examples: Grain's shuffle, computed for a whole run at once.

`grain.MapDataset.range(n).seed(seed).shuffle().repeat().batch(B)` costs about 25 microseconds an
index at n = 8192, and more for a smaller n. A sweep needs about a million indices. Grain shuffles
by a cycle-walking Feistel cipher of the index (a four-round Simon, keyed by `std::seed_seq`), which
is a pure function of (seed, epoch, index); the same function over whole NumPy arrays takes less
than a microsecond an index. `tests/data/test_order.py` pins both to be equal.

References: Beaulieu et al., "The Simon and Speck families" (2013), for the round function; Black
and Rogaway, "Ciphers with arbitrary finite domains" (2002), for cycle walking; ISO C++
[rand.util.seedseq], for the keys.
"""

import numpy as np

from qlora_jax import errors

_ROUNDS = 4  # what Grain's shuffle uses
_MIN_BLOCK_BITS = 16
_MASK32 = 0xFFFFFFFF


def batch_order(
  num_examples: int, batch_size: int, num_steps: int, seed: int, start_step: int = 0
) -> np.ndarray:
  """Returns the example indices of steps `start_step` to `start_step + num_steps`.

  Every epoch is a fresh permutation; a batch may cross from one epoch into the next. Any step can
  be asked for by itself, so a resumed run sees exactly the batches it would have seen. An epoch
  costs 2 to 6 milliseconds whatever its length: 1500 steps of 64 take 0.05 s for 8192 examples,
  0.7 s for 512.

  Args:
    num_examples: rows in the split, n >= 1.
    batch_size: rows in a batch.
    num_steps: batches to return.
    seed: any non-negative integer.
    start_step: index of the first batch to return.

  Returns:
    int32 [num_steps, batch_size], equal to Grain's iteration.

  Raises:
    UserError: a size below one, or a negative step or seed.
  """
  for field, value, least in (
    ("num_examples", num_examples, 1),
    ("batch_size", batch_size, 1),
    ("num_steps", num_steps, 0),
    ("seed", seed, 0),
    ("start_step", start_step, 0),
  ):
    if value < least:
      raise errors.UserError(f"{field} is {value}; it must be at least {least}")
  first, last = start_step * batch_size, (start_step + num_steps) * batch_size
  shuffle_seed = _shuffle_seed(seed)
  epochs = [
    epoch_order(num_examples, shuffle_seed + epoch)
    for epoch in range(first // num_examples, -(-last // num_examples))
  ]
  if not num_steps:
    return np.zeros((0, batch_size), np.int32)
  skipped = first % num_examples
  indices = np.concatenate(epochs)[skipped : skipped + last - first]
  return indices.reshape(num_steps, batch_size)


def epoch_order(num_examples: int, epoch_seed: int) -> np.ndarray:
  """Returns one permutation of `range(num_examples)`: Grain's `index_shuffle` of every index.

  Args:
    num_examples: length of the permutation.
    epoch_seed: the shuffle's seed plus the epoch; taken modulo 2**32.

  Returns:
    int32 [num_examples].
  """
  if num_examples == 1:
    return np.zeros(1, np.int32)
  block_bits = int(np.ceil(np.log2(num_examples - 1)))
  block_bits = max(block_bits + block_bits % 2, _MIN_BLOCK_BITS)
  word_bits = block_bits // 2
  keys = [np.uint32(key & (2**word_bits - 1)) for key in _seed_seq(epoch_seed & _MASK32, _ROUNDS)]
  order = _encrypt(np.arange(2**block_bits, dtype=np.uint32), keys, word_bits)
  # Values outside the domain are encrypted until they fall inside. Following all such walks at
  # once by doubling takes log2 of the longest walk, about 65536 / n steps for a small n.
  while (order[:num_examples] >= num_examples).any():
    walking = np.flatnonzero(order >= num_examples)
    order[walking] = order[order[walking]]
  return order[:num_examples].astype(np.int32)


def _shuffle_seed(seed: int) -> int:
  """Grain's default seed for a `shuffle` placed directly after `.seed(seed)`.

  It hashes the seed with the distance between the two nodes, so that neighbouring seeds do not
  share epochs.
  """
  return int(np.random.SeedSequence([seed, 1]).generate_state(1, dtype=np.uint32)[0])


def _encrypt(value: np.ndarray, keys: list[np.uint32], word_bits: int) -> np.ndarray:
  """Simon rounds over blocks of two words of `word_bits` each; a bijection of the blocks."""
  mask = np.uint32(2**word_bits - 1)

  def rotate(x, bits):
    return ((x << np.uint32(bits)) & mask) | (x >> np.uint32(word_bits - bits))

  def mix(x):
    return (rotate(x, 1) & rotate(x, 8)) ^ rotate(x, 2)

  left, right = value >> np.uint32(word_bits), value & mask
  for even, odd in zip(keys[::2], keys[1::2], strict=True):
    left = left ^ mix(right) ^ even
    right = right ^ mix(left) ^ odd
  return (left << np.uint32(word_bits)) | right


def _seed_seq(seed: int, size: int) -> list[int]:
  """`std::seed_seq{seed}.generate` of `size` words, for the sizes below 7 that are used here."""
  words = [0x8B8B8B8B] * size
  t = (size - 1) // 2  # the standard's t for n < 7
  p = (size - t) // 2
  q = p + t
  rounds = max(2, size)  # m = max(s + 1, n), with s = 1 seed word

  def scramble(x):
    return x ^ (x >> 27)

  for k in range(rounds):
    at, ahead, far = k % size, (k + p) % size, (k + q) % size
    r1 = 1664525 * scramble(words[at] ^ words[ahead] ^ words[(k - 1) % size]) & _MASK32
    extra = 1 if k == 0 else (k % size + seed if k == 1 else k % size)
    r2 = (r1 + extra) & _MASK32
    words[ahead] = (words[ahead] + r1) & _MASK32
    words[far] = (words[far] + r2) & _MASK32
    words[at] = r2
  for k in range(rounds, rounds + size):
    at, ahead, far = k % size, (k + p) % size, (k + q) % size
    total = (words[at] + words[ahead] + words[(k - 1) % size]) & _MASK32
    r3 = 1566083941 * scramble(total) & _MASK32
    r4 = (r3 - at) & _MASK32
    words[ahead] ^= r3
    words[far] ^= r4
    words[at] = r4
  return words
