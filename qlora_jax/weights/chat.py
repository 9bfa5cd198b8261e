"""Chat templates: Jinja programs from a model's files, rendered in a sandbox.

A template is untrusted code. It runs in Jinja's immutable sandbox and gets only plain JSON values.
Filters, globals and options are those of transformers, so that the rendered text equals the text of
the model's training. Jinja limits `range`, but not the total work: a template can be slow.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

from qlora_jax import errors


def render(
  template: str,
  messages: Sequence[Mapping[str, Any]],
  add_generation_prompt: bool = False,
  bos_token: str | None = None,
  eos_token: str | None = None,
  tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
  """Renders a conversation as text.

  Args:
    template: Jinja source, such as `Tokenizer.chat_template`.
    messages: one mapping per turn, with `role` and `content`.
    add_generation_prompt: True appends the start of an assistant turn.
    bos_token, eos_token: values of these names in the template; None leaves a name undefined.
    tools: JSON schemas of functions, for templates with tool support.

  Raises:
    UserError: the template is damaged, rejects the messages, or does something that the sandbox
      forbids.
  """
  special = {"bos_token": bos_token, "eos_token": eos_token}
  try:
    return compiled(template).render(
      messages=_plain(messages, "messages"),
      tools=_plain(tools, "tools"),
      documents=None,
      add_generation_prompt=add_generation_prompt,
      **{name: token for name, token in special.items() if token is not None},
    )
  except sandbox.SecurityError as error:
    raise errors.UserError(f"chat template: forbidden by the sandbox: {_line(error)}") from None
  except jinja2.TemplateError as error:
    raise errors.UserError(f"chat template: {_line(error)}") from None
  except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
    if isinstance(error, errors.UserError):
      raise
    raise errors.UserError(
      f"chat template: fails on these messages: {type(error).__name__}: {_line(error)}"
    ) from None


@functools.lru_cache(maxsize=32)
def compiled(template: str) -> jinja2.Template:
  """The compiled template, in a new environment. Raises `jinja2.TemplateSyntaxError`."""
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
  )
  environment.filters["tojson"] = _tojson
  environment.globals["raise_exception"] = _raise_exception
  environment.globals["strftime_now"] = _strftime_now
  environment.globals["dict"] = _Dict()
  environment.globals["namespace"] = _Namespace
  return environment.from_string(template)


class _Generation(ext.Extension):
  """`{% generation %}` marks assistant text for training masks; here it has no effect."""

  tags = {"generation"}  # noqa: RUF012 - the form that Jinja requires

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("_pass_through")
    return nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _pass_through(self, caller: Any) -> str:
    return caller()


class _Dict:
  """`dict(...)` without the attributes of the class `dict`."""

  def __call__(self, *args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)

  def fromkeys(self, *args: Any) -> dict:
    return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
  """`namespace(...)` that refuses names with a leading underscore."""

  def __init__(*args: Any, **kwargs: Any) -> None:
    # No parameter `self`, so that a template can write `namespace(self=...)`.
    attributes = dict(*args[1:], **kwargs)
    for name in attributes:
      _check_name(name)
    jinja2.utils.Namespace.__init__(args[0], attributes)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: Any) -> None:
  if isinstance(name, str) and name.startswith("_"):
    raise sandbox.SecurityError(f"a namespace takes no attribute {name!r}")


def _tojson(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  # Jinja's filter escapes HTML. Models are trained on unescaped text.
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _raise_exception(message: str) -> None:
  raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


def _plain(value: Any, where: str) -> Any:
  """A copy of plain JSON types: the sandbox does not restrict the methods of other objects."""
  if value is None or type(value) in (str, int, float, bool):
    return value
  if isinstance(value, Mapping):
    return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
  raise errors.UserError(
    f"chat: {where} is a {type(value).__name__}; only JSON values are rendered"
  )


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:200]


def stop_ids(tokenizer) -> list[int]:
  """Sorted ids of the tokens that end an answer."""
  end_of_turn_ids = (
    tokenizer.token_id(name) for name in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
  )
  return sorted({token for token in (tokenizer.eos_id, *end_of_turn_ids) if token is not None})
