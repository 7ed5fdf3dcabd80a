"""The chat template in Jinja, for programs that know only Hugging Face folders.

It renders what `template.render` renders, from the same dicts, with two exceptions. Tool-call arguments given as
JSON text are inserted as they are, not parsed and written again, because Jinja cannot parse JSON. Several results of
tools in a row keep a turn each.
"""

from __future__ import annotations

import json

from mlx_afm.text.template import DEFAULT_SYSTEM

_JINJA = """\
{{- @EOS@ -}}
@SYSTEM@{%- for message in messages -%}
  {%- set role = {'function': 'tool', 'developer': 'system'}.get(message['role'], message['role']) -%}
  {%- if role == 'system' and not loop.first -%}
    {{- raise_exception('a system message can only be the first') -}}
  {%- endif -%}
  {{- '<turn_start> ' + role + '<n>' -}}
  {%- set content = message['content'] -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content is mapping -%}
    {{- content | tojson -}}
  {%- elif content is iterable -%}
    {%- set item = content[0] if content and content[0] is mapping else {} -%}
    {%- set function = item['function'] if item['function'] is mapping else item -%}
    {%- if item['type'] == 'text' and item['text'] is string -%}
      {{- content | map(attribute='text') | join('') -}}
    {%- elif function['name'] is string and 'arguments' not in function and
             ('function' in item or item['parameters'] is mapping or item['input_schema'] is mapping) -%}
      {{- 'new tools: ' + (content | map('tojson') | join('\\n')) -}}
    {%- else -%}
      {{- content | tojson -}}
    {%- endif -%}
  {%- endif -%}
  {%- if message['tool_calls'] -%}
    {{- '<executable_start> ```function\\n[' -}}
    {%- for call in message['tool_calls'] -%}
      {%- set arguments = call['function']['arguments'] -%}
      {{- '{"name": ' + (call['function']['name'] | tojson) + ', "arguments": ' -}}
      {{- arguments if arguments is string else (arguments | tojson) -}}
      {{- '}' + ('' if loop.last else ', ') -}}
    {%- endfor -%}
    {{- ']```<executable_end>' -}}
  {%- endif -%}
  {%- if message['response_format'] -%}
    {%- set format = message['response_format']['json_schema'] -%}
    {{- '\\n\\nresponse format in json.\\nname: ' ~ format.get('name') -}}
    {{- '\\ndescription: ' ~ format.get('description') -}}
    {{- '\\nschema: ' + (format['schema'] | tojson) -}}
  {%- endif -%}
  {%- set definitions = (tools if loop.first and tools else message['tools']) -%}
  {%- if definitions -%}
    {{- '<n>system tools: ' + (definitions | map('tojson') | join('<n>')) -}}
  {%- endif -%}
  {{- '<turn_end>' -}}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}
  {{- '<turn_start> assistant<n>' -}}
{%- endif -%}
"""


_SYSTEM = """\
{%- if messages[0]['role'] not in ['system', 'developer'] -%}
  {%- set messages = [{'role': 'system', 'content': @TEXT@}] + messages -%}
{%- endif -%}
"""


def hf_chat_template(eos_piece: str, system: str | None = DEFAULT_SYSTEM) -> str:
    """The Jinja text; its output begins with the end-of-sequence piece, as the ids do.

    Args:
        eos_piece: the end-of-sequence piece.
        system: system prompt of conversations without a system message; None for no system turn.
    """
    turn = "" if system is None else _SYSTEM.replace("@TEXT@", json.dumps(system))
    return _JINJA.replace("@EOS@", json.dumps(eos_piece)).replace("@SYSTEM@", turn)
