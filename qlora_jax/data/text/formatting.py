"""From an example to tokens and a loss mask that covers the answers and nothing else.

The instruction can reach a model in the prompt, in the router's query and as the router's prior.
The first is `instruction_in_prompt` here; for the other two every example carries its
`instruction_id`, and the router looks its embedding up.

    tokens = encode(rendered prompt) ++ encode(answer ++ what the template puts after it)

The prompt's tokens in training are therefore the very tokens that generation starts from. A chat
template whose conversation does not begin with its own prompt cannot be trained on and is refused.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from qlora_jax import errors
from qlora_jax.data.text import records
from qlora_jax.weights import chat

Render = Callable[[Sequence[records.Message], bool], str]


class Tokenizer(Protocol):
  """What is asked of a tokenizer."""

  eos_id: int | None
  bos_id: int | None
  pad_id: int | None

  def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
  """One tokenised example.

  Attributes:
    tokens: int32 [n].
    answer_mask: bool [n], True on the tokens of the answers and on the token that ends each.
    prompt_length: tokens before the last answer: what generation starts from.
    instruction_id: row of `TextData.instruction_texts`.
    source: names the example in messages.
  """

  tokens: np.ndarray
  answer_mask: np.ndarray
  prompt_length: int
  instruction_id: int
  source: str

  @property
  def prompt(self) -> np.ndarray:
    """int32 [prompt_length]."""
    return self.tokens[: self.prompt_length]


def renderer(tokenizer, system: str | None = None, template: str | None = None) -> Render:
  """How a conversation becomes text: the model's chat template, or plain lines without one.

  Args:
    tokenizer: of the model.
    system: system message of conversations that have none; None leaves it to the template, which
      may write one of its own.
    template: text around a prompt instead of the model's chat template, with `{prompt}`.
  """
  if template is not None:
    return template_render(template, tokenizer.bos_token or "")

  def render(messages, add_generation_prompt):
    if system is not None and messages[0]["role"] != "system":
      messages = ({"role": "system", "content": system}, *messages)
    if not tokenizer.chat_template:
      return plain_render(messages, add_generation_prompt)
    return chat.render(
      tokenizer.chat_template,
      messages,
      add_generation_prompt,
      tokenizer.bos_token,
      tokenizer.eos_token,
    )

  return render


def plain_render(messages: Sequence[records.Message], add_generation_prompt: bool) -> str:
  """A rendering for base models without a chat template: one `Role: text` line a message."""
  lines = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
  return "".join(lines) + ("Assistant:" if add_generation_prompt else "")


def template_render(template: str, start: str = "") -> Render:
  """A rendering in which `template` surrounds each user's message, for base models.

  Args:
    template: text with `{prompt}`; the answer follows it at once.
    start: text before everything, such as the token that begins a text.
  """

  def render(messages: Sequence[records.Message], add_generation_prompt: bool) -> str:
    del add_generation_prompt  # a prompt ends as the template does
    parts = []
    for message in messages:
      if message["role"] == "user":
        parts.append(template.replace("{prompt}", message["content"]))
      elif message["role"] == "assistant":
        parts.append(f"{message['content']}\n")
    return start + "".join(parts)

  return render


def chat_messages(
  example: records.Example, *, instruction_in_prompt: bool
) -> tuple[records.Message, ...]:
  """The conversation that an example stands for; the last message is the answer.

  The instruction stands before the input in the user's message, a blank line between them. In a
  conversation of the user's own it is the system message, which is left out on request.
  """
  if example.messages is not None:
    if instruction_in_prompt:
      return example.messages
    return tuple(message for message in example.messages if message["role"] != "system")
  parts = (example.instruction if instruction_in_prompt else "", example.prompt)
  return (
    {"role": "user", "content": "\n\n".join(part for part in parts if part)},
    {"role": "assistant", "content": example.answers[0]},
  )


def encode_example(
  example: records.Example,
  tokenizer: Tokenizer,
  render: Render,
  *,
  instruction_in_prompt: bool,
) -> Encoded:
  """Tokenises an example; every turn of the assistant is an answer.

  The token that ends a turn is the first `eos_id` that the template puts after the answer; if it
  puts none, `eos_id` is added. An empty answer gets no mask (`packing.fit` deals with it).

  Args:
    example: what to tokenise.
    tokenizer: encodes text; special tokens written in the text must become their ids.
    render: `(messages, add_generation_prompt) -> text`, the chat template.
    instruction_in_prompt: whether the instruction is part of the prompt.

  Raises:
    UserError: the tokenizer has no `eos_id`; the template changes the prompt once an answer follows
      it, or leaves the answer out.
  """
  messages = chat_messages(example, instruction_in_prompt=instruction_in_prompt)
  if tokenizer.eos_id is None:
    raise errors.UserError("the tokenizer has no end-of-text token; give it an eos_token")
  tokens: list[int] = []
  mask: list[bool] = []
  written, prompt_length = "", 0

  def add(ids: list[int], is_answer: bool) -> None:
    tokens.extend(ids)
    mask.extend([is_answer] * len(ids))

  for turn, message in enumerate(messages):
    if message["role"] != "assistant":
      continue
    before = render(messages[:turn], True)
    after = render(messages[: turn + 1], False)
    if not (before.startswith(written) and after.startswith(before)):
      raise errors.UserError(
        f"{_label(example)}: the chat template's conversation does not begin with its prompt, so "
        "answers cannot be told from prompts; use a template that appends"
      )
    answer, content = after[len(before) :], message["content"].strip()
    if content not in answer:
      raise errors.UserError(f"{_label(example)}: the chat template leaves the answer out")
    add(tokenizer.encode(before[len(written) :], add_special_tokens=False), False)
    prompt_length = len(tokens)
    ids = tokenizer.encode(answer, add_special_tokens=False)
    if tokenizer.eos_id in ids:
      end = ids.index(tokenizer.eos_id) + 1
    else:
      ids = [*tokenizer.encode(answer.rstrip(), add_special_tokens=False), tokenizer.eos_id]
      end = len(ids)
    add(ids[:end], bool(content))
    if any(later["role"] == "assistant" for later in messages[turn + 1 :]):
      add(ids[end:], False)  # what stands between two turns; after the last it is dropped
    written = after
  return Encoded(
    tokens=np.asarray(tokens, np.int32),
    answer_mask=np.asarray(mask, bool),
    prompt_length=prompt_length,
    instruction_id=example.paraphrase_id,
    source=_label(example),
  )


def _label(example: records.Example) -> str:
  return example.source or f"example {example.prompt[:40]!r} of task {example.task!r}"
