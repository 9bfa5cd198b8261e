"""Tokens and masks: the mask covers answers and their end tokens, never prompts."""

import dataclasses

import numpy as np
import pytest

from qlora_jax import errors
from qlora_jax.data.text import formatting, records

EXAMPLE = records.Example("Write the plural.", "apple", ("apples", "appels"), "plural", 4)
CHAT = records.Example(
  "Be brief.",
  "And France?",
  ("Paris.",),
  "chat",
  0,
  messages=(
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Capital of Italy?"},
    {"role": "assistant", "content": "Rome."},
    {"role": "user", "content": "And France?"},
    {"role": "assistant", "content": "Paris."},
  ),
)


def _encode(example, tokenizer, render, instruction_in_prompt=True):
  return formatting.encode_example(
    example, tokenizer, render, instruction_in_prompt=instruction_in_prompt
  )


def test_mask_covers_the_first_answer_and_its_end_and_nothing_else(tokenizer, render):
  example = _encode(EXAMPLE, tokenizer, render)
  assert example.tokens.dtype == np.int32 and example.answer_mask.dtype == bool
  assert tokenizer.decode(example.tokens[example.answer_mask]) == "apples<|im_end|>"
  prompt = "<|im_start|>user\nWrite the plural.\n\napple<|im_end|>\n<|im_start|>assistant\n"
  assert tokenizer.decode(example.tokens[~example.answer_mask]) == prompt
  assert example.tokens[-1] == tokenizer.eos_id and example.instruction_id == 4


def test_training_prompt_is_exactly_what_generation_starts_from(tokenizer, render):
  example = _encode(EXAMPLE, tokenizer, render)
  prompt = render([{"role": "user", "content": "Write the plural.\n\napple"}], True)
  np.testing.assert_array_equal(example.prompt, tokenizer.encode(prompt))
  assert not example.answer_mask[: example.prompt_length].any()
  assert example.answer_mask[example.prompt_length :].all()


def test_instruction_can_be_left_out_of_the_prompt_but_stays_known(tokenizer, render):
  example = _encode(EXAMPLE, tokenizer, render, instruction_in_prompt=False)
  assert "plural" not in tokenizer.decode(example.tokens) and example.instruction_id == 4


def test_every_turn_of_the_assistant_is_an_answer(tokenizer, render):
  example = _encode(CHAT, tokenizer, render)
  assert tokenizer.decode(example.tokens[example.answer_mask]) == "Rome.<|im_end|>Paris.<|im_end|>"
  assert tokenizer.decode(example.tokens) == render(CHAT.messages, False).rstrip("\n")
  assert tokenizer.decode(example.prompt) == render(CHAT.messages[:-1], True)
  without = _encode(CHAT, tokenizer, render, instruction_in_prompt=False)
  assert "Be brief" not in tokenizer.decode(without.tokens)


def test_end_is_added_where_the_template_has_none(tokenizer):
  example = _encode(EXAMPLE, tokenizer, formatting.plain_render)
  assert tokenizer.decode(example.tokens) == (
    "User: Write the plural.\n\napple\nAssistant: apples<|im_end|>"
  )
  assert tokenizer.decode(example.tokens[example.answer_mask]) == " apples<|im_end|>"
  chat = _encode(CHAT, tokenizer, formatting.plain_render)
  assert tokenizer.decode(chat.tokens[chat.answer_mask]) == " Rome.<|im_end|> Paris.<|im_end|>"


def test_template_that_rewrites_its_prompt_is_refused(tokenizer):
  def rewriting(messages, add_generation_prompt):
    return f"{len(messages)} " + formatting.plain_render(messages, add_generation_prompt)

  with pytest.raises(errors.UserError, match=r"example 'apple' of task 'plural'.*does not begin"):
    _encode(EXAMPLE, tokenizer, rewriting)

  def dropping(messages, add_generation_prompt):
    return formatting.plain_render(messages[:1], True)

  with pytest.raises(errors.UserError, match="omits the answer"):
    _encode(EXAMPLE, tokenizer, dropping)


def test_an_empty_answer_has_no_mask(tokenizer, render):
  example = _encode(records.Example("", "apple", ("",), "t", 0), tokenizer, render)
  assert not example.answer_mask.any()


def test_a_tokenizer_without_an_end_is_refused(tokenizer, render):
  with pytest.raises(errors.UserError, match="no end-of-text token"):
    _encode(EXAMPLE, dataclasses.replace(tokenizer, eos_id=None), render)
