"""Answers that must call tools: one block of calls, each of a given tool, with arguments by its own schema.

<executable_start> ```function
[{"name": "weather", "arguments": {"city": "Paris"}}]```<executable_end>
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_afm.errors import ConfigError
from mlx_afm.generation.guided import SEPARATORS, GuidedProcessor, processor_of_grammar
from mlx_afm.generation.schema import parse_wanted
from mlx_afm.text.tokenizer import AFMTokenizer

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def tool_call_processor(
    tokenizer: AFMTokenizer, tools: Sequence[Mapping[str, Any]], *, one_call: bool = False
) -> GuidedProcessor:
    """What keeps one answer to calls of tools; a new one for each answer.

    Args:
        tokenizer: the model's.
        tools: at least one, in OpenAI's form: `{"function": {"name", "parameters"}}`; without parameters, or if they
            name no properties, it is called without arguments.
        one_call: one call, where else there may be several.

    Raises:
        MissingDependencyError, ConfigError: see `guided_processor`; also a tool without name, or none at all.
    """
    if not tools:
        raise ConfigError("no tool to call", where="tools", expected="at least one")
    calls = [_call(tool, index) for index, tool in enumerate(tools)]
    start, end = tokenizer.executable_start_id, tokenizer.executable_end_id
    more = "" if one_call else ' (", " call)*'
    lines = [
        f'start: <[{start}]> " ```function\\n[" call{more} "]```" <[{end}]>',
        f"call: {' | '.join(f'call_{index}' for index in range(len(calls)))}",
        *(line for call in calls for line in call),
    ]
    return processor_of_grammar(tokenizer, "\n".join(lines), where="tools")


def _call(tool: Mapping[str, Any], index: int) -> tuple[str, str]:
    """A call and its arguments as rules, in llguidance's form of Lark. Each schema stands alone, with its `$defs`."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        expected = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
        raise ConfigError("a tool without name", where=f"tools, tool {index}", expected=expected)
    parameters = function.get("parameters")
    wanted = parse_wanted(NO_ARGUMENTS if parameters is None else parameters)
    if wanted.kind != "json":
        raise ConfigError("parameters are no JSON schema", where=f"tools, tool {index}", found=wanted.kind)
    schema = {"type": "object", **json.loads(wanted.text)}
    if set(schema) <= {"type", "title", "description", "required", "$schema"}:
        schema = NO_ARGUMENTS  # it names none
    opening = f'{{"name": {json.dumps(name)}, "arguments": '
    rule = json.dumps(schema | {"x-guidance": SEPARATORS})
    return f'call_{index}: {json.dumps(opening)} arguments_{index} "}}"', f"arguments_{index}: %json {rule}"
