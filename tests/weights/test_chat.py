"""Chat templates: the same text as transformers for real templates, and a safe sandbox."""

import datetime
import json

import pytest
import tokenizers
import transformers

from qlora_jax import errors
from qlora_jax.weights import chat
from qlora_jax.weights import tokenizer as tokenizer_lib

LLAMA3 = (
  "{% set loop_messages = messages %}{% for message in loop_messages %}"
  "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
  "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
  "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
  "{% endif %}"
)
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}
            {{- '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
GEMMA = (
  "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
  "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
  "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
  "{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
  "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
  "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
BLOCKS = """
{% set ns = namespace(count=0, last='') %}
{% for message in messages %}
  {% if message.role == 'system' %}
    {% continue %}
  {% endif %}
  {% set ns.count = ns.count + 1 %}
  {% generation %}{{ message.role }}: {{ message.content | upper }}{% endgeneration %}
  {{ eos_token }}

  {% if ns.count >= 3 %}
    {% break %}
  {% endif %}
{% endfor %}
{{ dict(a=ns.count) | tojson(sort_keys=true) }} {{ pad_token is defined }}
"""
TEMPLATES = {
  "llama3": LLAMA3,
  "llama3.1": LLAMA31,
  "qwen2.5": QWEN25,
  "gemma": GEMMA,
  "blocks": BLOCKS,
}

USER = {"role": "user", "content": '  What\'s 2 < 3 & "4"?\n'}
ANSWER = {"role": "assistant", "content": "Größer 🙂 <b>x</b>  "}
SYSTEM = {"role": "system", "content": "Be brief.\n\nAnd kind."}
CALL = {
  "role": "assistant",
  "content": "",
  "tool_calls": [{"name": "add", "arguments": {"b": 2, "a": [1, None, "é'"]}}],
}
TOOLS = [
  {
    "type": "function",
    "function": {"name": "add", "description": "Adds <two> numbers — e.g. 'a' & b."},
  }
]
CHATS = {
  "one": [USER],
  "two turns": [USER, ANSWER, {"role": "user", "content": ""}],
  "system": [SYSTEM, USER, ANSWER, USER],
  "tools": [USER, CALL, {"role": "tool", "content": "3"}, {"role": "tool", "content": "4"}, ANSWER],
}


@pytest.fixture(scope="module")
def theirs(bpe):
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(bpe.to_str()),
    bos_token="<|im_start|>",
    eos_token="<|im_end|>",
  )


def _render(template, messages, **options):
  return chat.render(
    template, messages, bos_token="<|im_start|>", eos_token="<|im_end|>", **options
  )


@pytest.mark.parametrize("conversation", sorted(CHATS))
@pytest.mark.parametrize("name", ["smollm2", *TEMPLATES])
def test_text_is_that_of_transformers(theirs, smollm2, name, conversation):
  template = TEMPLATES.get(name) or smollm2.tokenizer().chat_template
  messages, compared = CHATS[conversation], 0
  for tools in (None, TOOLS):
    for prompt in (False, True):
      try:
        expected = theirs.apply_chat_template(
          messages,
          tools=tools,
          chat_template=template,
          add_generation_prompt=prompt,
          tokenize=False,
        )
      except Exception as error:  # a template can raise; then our message contains its message
        with pytest.raises(errors.UserError) as caught:
          _render(template, messages, tools=tools, add_generation_prompt=prompt)
        assert str(error) in str(caught.value)
        continue
      actual = _render(template, messages, tools=tools, add_generation_prompt=prompt)
      assert actual == expected
      compared += 1
  refuses = name == "gemma" and conversation in ("system", "tools")
  assert compared == (0 if refuses else 4)


def test_smollm2_text_is_written_out(smollm2):
  text = chat.render(smollm2.tokenizer().chat_template, [{"role": "user", "content": "Hi"}], True)
  assert text == (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  )


def test_today_is_written(theirs):
  text = _render(LLAMA31, [USER])
  assert f"Today Date: {datetime.datetime.now():%d %b %Y}" in text


def test_rendering_leaves_the_messages_alone():
  messages = json.loads(json.dumps(CHATS["tools"]))
  _render("{% set messages = messages[1:] %}{{ messages | length }}", messages)
  assert messages == CHATS["tools"]
  with pytest.raises(errors.UserError, match="sandbox"):
    _render("{{ messages.append(1) }}", messages)
  with pytest.raises(errors.UserError, match="sandbox"):
    _render("{% set _ = messages[0].update(role='x') %}", messages)


@pytest.mark.parametrize(
  "template",
  [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ dict.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ (messages | attr('__class__')) }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{{ ('{0.__class__}' | string).format(1) }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "{{ messages.pop() }}",
    "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ messages | map(attribute='__class__') | list | first }}",
    "{{ ().__class__ }}",
    "{{ (1).__class__.__bases__ }}",
  ],
)
def test_malicious_template_is_refused(template):
  try:
    text = _render(template, [USER])
  except errors.UserError as error:
    assert "\n" not in str(error)
  else:
    # Undefined attributes render as empty text: no Python object is visible.
    assert text == "", text


def test_objects_with_methods_never_reach_a_template():
  class Message(dict):
    def steal(self):
      raise AssertionError("was called")

  with pytest.raises(errors.UserError):
    _render("{{ messages[0].steal() }}", [Message(USER)])
  with pytest.raises(errors.UserError, match=r"messages\[0\].content is a object"):
    _render("{{ messages }}", [{"role": "user", "content": object()}])


@pytest.mark.parametrize(
  ("template", "reason"),
  [
    ("{% for m in messages %}", "endfor"),
    ("{{ messages[0].content + 1 }}", "TypeError"),
    ("{{ messages[0].x.y }}", "no attribute 'x'"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ raise_exception('two\nlines') }}", "two lines"),
    ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
  ],
)
def test_failing_template_is_one_line(template, reason):
  with pytest.raises(errors.UserError) as caught:
    _render(template, [USER])
  assert reason in str(caught.value)
  assert "\n" not in str(caught.value)


def test_chat_tokens_are_those_of_transformers(theirs, tmp_path, bpe):
  bpe.save(str(tmp_path / "tokenizer.json"))
  config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": QWEN25}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  ours = tokenizer_lib.from_folder(tmp_path)
  for messages in CHATS.values():
    text = _render(ours.chat_template, messages)
    expected = theirs.apply_chat_template(messages, chat_template=QWEN25, return_dict=False)
    assert ours.encode(text, add_special_tokens=False) == expected
