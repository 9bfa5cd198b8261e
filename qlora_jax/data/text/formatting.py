"""Converts an example to tokens and a loss mask that covers only the answers.

An instruction can enter a model through the prompt, the router's query and the router's prior. The
first is `instruction_in_prompt` here. For the other two, every example has an `instruction_id`,
with which the router looks up the instruction's embedding.

    tokens = encode(rendered prompt) ++ encode(answer ++ the template's text after it)

Training and generation therefore use the same prompt tokens. Training needs a chat template that
only appends: a template is refused if the rendered conversation does not begin with the rendered
prompt.
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
  """The attributes of a tokenizer that this package uses."""

  eos_id: int | None
  bos_id: int | None
  pad_id: int | None

  def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
  """One tokenised example.

  Attributes:
    tokens: int32 [n].
    answer_mask: bool [n], True on the tokens of the answers and on the token that ends each answer.
    prompt_length: number of tokens before the last answer, the start of generation.
    instruction_id: row of `TextData.instruction_texts`.
    source: name of the example in messages.
  """

  tokens: np.ndarray
  answer_mask: np.ndarray
  prompt_length: int
  instruction_id: int
  source: str

  @property
  def prompt(self) -> np.ndarray:
    """The tokens before the last answer: int32 [prompt_length]."""
    return self.tokens[: self.prompt_length]


def renderer(tokenizer, system: str | None = None, template: str | None = None) -> Render:
  """Returns the function that renders a conversation as text.

  It uses `template` if one is given, else the model's chat template, else plain lines.

  Args:
    tokenizer: the model's tokenizer.
    system: system message of conversations that have none. None adds no message; the chat template
      can then write a default one.
    template: text with `{prompt}`, used instead of the model's chat template; None uses the latter.
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
  """Renders one `Role: text` line per message, for base models without a chat template."""
  lines = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
  return "".join(lines) + ("Assistant:" if add_generation_prompt else "")


def template_render(template: str, start: str = "") -> Render:
  """Returns a renderer that inserts each user message into `template`, for base models.

  Args:
    template: text with `{prompt}`; the answer follows directly.
    start: text before the first message, such as the bos token.
  """

  def render(messages: Sequence[records.Message], add_generation_prompt: bool) -> str:
    del add_generation_prompt  # the template's end is already the generation prompt
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
  """Returns an example as a conversation; the last message is the answer.

  The user message is the instruction, a blank line and the input. In a conversation from the user's
  data, the instruction is the system message; `instruction_in_prompt=False` removes it.
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

  The token that ends a turn is the first `eos_id` that the template writes after the answer. If the
  template writes none, `eos_id` is added. The mask of an empty answer is False (`packing.fit` drops
  or refuses such an example).

  Args:
    example: the example.
    tokenizer: encodes text; it must map special tokens in the text to their ids.
    render: `(messages, add_generation_prompt) -> text`, the chat template.
    instruction_in_prompt: whether the instruction is part of the prompt.

  Raises:
    UserError: the tokenizer has no `eos_id`, or the template changes the prompt when an answer
      follows it, or the template omits the answer.
  """
  messages = chat_messages(example, instruction_in_prompt=instruction_in_prompt)
  if tokenizer.eos_id is None:
    raise errors.UserError("the tokenizer has no end-of-text token; give it an eos_token")
  tokens: list[int] = []
  mask: list[bool] = []
  rendered, prompt_length = "", 0

  def add(ids: list[int], is_answer: bool) -> None:
    tokens.extend(ids)
    mask.extend([is_answer] * len(ids))

  for turn, message in enumerate(messages):
    if message["role"] != "assistant":
      continue
    before = render(messages[:turn], True)
    after = render(messages[: turn + 1], False)
    if not (before.startswith(rendered) and after.startswith(before)):
      raise errors.UserError(
        f"{_label(example)}: the chat template's conversation does not begin with its prompt, so "
        "the answer cannot be separated from the prompt; use a template that only appends"
      )
    answer, content = after[len(before) :], message["content"].strip()
    if content not in answer:
      raise errors.UserError(f"{_label(example)}: the chat template omits the answer")
    add(tokenizer.encode(before[len(rendered) :], add_special_tokens=False), False)
    prompt_length = len(tokens)
    ids = tokenizer.encode(answer, add_special_tokens=False)
    if tokenizer.eos_id in ids:
      end = ids.index(tokenizer.eos_id) + 1
    else:
      ids = [*tokenizer.encode(answer.rstrip(), add_special_tokens=False), tokenizer.eos_id]
      end = len(ids)
    add(ids[:end], bool(content))
    if any(later["role"] == "assistant" for later in messages[turn + 1 :]):
      add(ids[end:], False)  # text between two turns; dropped after the last turn
    rendered = after
  return Encoded(
    tokens=np.asarray(tokens, np.int32),
    answer_mask=np.asarray(mask, bool),
    prompt_length=prompt_length,
    instruction_id=example.paraphrase_id,
    source=_label(example),
  )


def _label(example: records.Example) -> str:
  return example.source or f"example {example.prompt[:40]!r} of task {example.task!r}"
