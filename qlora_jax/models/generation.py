"""Text generation with a decoder: batched, with a key-value cache, greedy or sampled.

Prompts of different lengths are padded on the left. Padding is a separate segment, so that no
token sees it. One compiled program reads the prompts; another computes the next token.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from qlora_jax import errors
from qlora_jax.models import attention, decoder
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array, PyTree

# Prompts and caches are padded to multiples of these, so that few lengths are compiled. The step
# for caches is larger because an unused slot is cheap; a padded prompt token is computed in full.
_ROUND_PROMPT = 8
_ROUND_CACHE = 32


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the next token is chosen.

  Attributes:
    max_tokens: maximum number of generated tokens.
    temperature: divides the logits; 0 takes the most likely token.
    top_p: samples from the smallest set of tokens whose probabilities sum to at least this.
    seed: of the sampling.

  Raises:
    UserError: a field is out of range.
  """

  max_tokens: int = 64
  temperature: float = 0.0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if self.max_tokens < 1:
      raise errors.UserError(f"max_tokens: {self.max_tokens} is not at least 1")
    if not self.temperature >= 0:
      raise errors.UserError(f"temperature: {self.temperature} is not at least 0")
    if not 0 < self.top_p <= 1:
      raise errors.UserError(f"top_p: {self.top_p} is not in (0, 1]")


class State(NamedTuple):
  """State between two steps of generation.

  Attributes:
    token: int32 [B], the last token of each row.
    position: int32 [B], its position.
    done: bool [B], whether the row has produced a stop token.
    cache: keys and values of the earlier tokens.
    key: of the sampling.
  """

  token: Array
  position: Array
  done: Array
  cache: attention.Cache
  key: Array


def generate(
  model: decoder.Decoder,
  variables: PyTree,
  prompts: Sequence[Sequence[int]],
  stop: Sequence[int] = (),
  sampling: SamplingConfig | None = None,
  instruction: Array | None = None,
) -> list[list[int]]:
  """The tokens that follow each prompt, up to and without the first token of `stop`.

  Args:
    model: the decoder, with its adapter if it has one.
    variables: all collections of the model.
    prompts: token ids, at least one per prompt.
    stop: ids that end a text.
    sampling: see `SamplingConfig`; greedy by default.
    instruction: embeddings [B, E], one per prompt, or None.

  Raises:
    UserError: a prompt is empty, or prompt and new tokens exceed the model's context.
  """
  texts: list[list[int]] = [[] for _ in prompts]
  ended = [False] * len(prompts)
  for tokens in stream(model, variables, prompts, stop, sampling, instruction):
    for row, token in enumerate(tokens):
      ended[row] = ended[row] or token in stop
      if not ended[row]:
        texts[row].append(int(token))
  return texts


def stream(
  model: decoder.Decoder,
  variables: PyTree,
  prompts: Sequence[Sequence[int]],
  stop: Sequence[int] = (),
  sampling: SamplingConfig | None = None,
  instruction: Array | None = None,
) -> Iterator[np.ndarray]:
  """Yields the next tokens int32 [B], one per prompt, until all have stopped; see `generate`."""
  sampling = sampling or SamplingConfig()
  if not prompts or not all(len(prompt) for prompt in prompts):
    raise errors.UserError("prompt: empty; give at least one token")
  longest = max(map(len, prompts))
  padded = _rounded(longest, _ROUND_PROMPT)
  limit = model.config.max_length
  if longest + sampling.max_tokens > limit:
    raise errors.UserError(
      f"max_tokens: {longest} prompt tokens and {sampling.max_tokens} new ones are more than the"
      f" model's context of {limit}"
    )
  tokens = np.zeros((len(prompts), padded), np.int32)
  positions, segments = np.zeros_like(tokens), np.full_like(tokens, attention.PADDING)
  for row, prompt in enumerate(prompts):
    first = padded - len(prompt)
    tokens[row, first:], positions[row, first:] = prompt, np.arange(len(prompt))
    segments[row, first:] = 1
  slots = _rounded(padded + sampling.max_tokens, _ROUND_CACHE)
  ends = np.asarray(list(stop) or [-1], np.int32)
  state = _prefill(
    model, slots, sampling, variables, tokens, positions, segments, instruction, ends
  )
  for step in range(sampling.max_tokens):
    # The next step is dispatched before this one is read, so that the device does not wait for
    # the host.
    next_state = None
    if step + 1 < sampling.max_tokens:
      next_state = _step(model, sampling, variables, state, instruction, ends)
    yield np.asarray(state.token)
    if np.asarray(state.done).all():
      return
    state = next_state


def _rounded(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(model, slots, sampling, variables, tokens, positions, segments, instruction, ends):
  cfg = model.config
  cache = attention.empty_cache(
    cfg.layers, tokens.shape[0], slots, cfg.groups, cfg.head_dim, jnp.dtype(cfg.dtype)
  )
  output = model.apply(variables, tokens, positions, segments, instruction, cache)
  key = jax.random.key(sampling.seed)
  done = jnp.zeros(tokens.shape[0], bool)
  return _next(model, sampling, variables, output, positions[:, -1], done, key, ends)


# The state is not donated: the host reads it while the next step runs.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(model, sampling, variables, state, instruction, ends):
  position = state.position[:, None] + 1
  segments = jnp.ones_like(position)
  output = model.apply(
    variables, state.token[:, None], position, segments, instruction, state.cache
  )
  return _next(model, sampling, variables, output, position[:, 0], state.done, state.key, ends)


def _next(model, sampling, variables, output, position, done, key, ends) -> State:
  logits = model.apply(variables, output.hidden[:, -1], method="logits")
  key, step_key = jax.random.split(key)
  # Replicated, because all processes of a mesh read the tokens.
  token = sharding.constrain(choose(logits, sampling, step_key), None)
  done = sharding.constrain(done | jnp.isin(token, ends), None)
  return State(token, position, done, output.cache, key)


def choose(logits: Array, sampling: SamplingConfig, key: Array) -> Array:
  """The next token [B] int32 from logits [B, V]."""
  if not sampling.temperature:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / sampling.temperature
  if sampling.top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
    lowest = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits >= lowest, logits, -jnp.inf)
  return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
