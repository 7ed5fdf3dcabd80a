"""The chat template in Jinja, for programs that know only Hugging Face folders.

It renders what `template.render` renders, from the same dicts, with one exception that Jinja
imposes: tool-call arguments given as JSON text are inserted as they are, not parsed and written again.
"""

from __future__ import annotations

import json

from mlx_afm.text.template import DEFAULT_SYSTEM

_JINJA = """\
{{- @EOS@ -}}
@SYSTEM@{%- for message in messages -%}
  {%- set role = 'tool' if message['role'] == 'function' else message['role'] -%}
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
    {{- 'new tools: ' + (content | map('tojson') | join('\\n')) -}}
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
{%- if messages[0]['role'] != 'system' -%}
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
