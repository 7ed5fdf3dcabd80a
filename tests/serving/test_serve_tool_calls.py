"""Tool calls that a request forces, over HTTP: their own properties, one call of a named tool, and cut answers."""

import json

import jsonschema
import pytest

from serving_client import chat

pytest.importorskip("llguidance", reason="needs the guided extra")
CHAT = "/v1/chat/completions"
MARKS = ("<executable_start>", "<executable_end>")
# As pydantic, LangChain and instructor send them: no additionalProperties.
FLAG = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
NESTED = {
    "$defs": {"Flag": FLAG},
    "type": "object",
    "properties": {"one": {"$ref": "#/$defs/Flag"}, "two": {"anyOf": [{"$ref": "#/$defs/Flag"}, {"type": "null"}]}},
    "required": ["one", "two"],
}


def tool(name, parameters):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("flag", FLAG), tool("nested", NESTED), tool("bare", {"type": "object"}), tool("none", {"properties": {}})]


@pytest.fixture
def ask(server, call):
    """A function that forces calls at a high temperature, and gives the choice and its calls."""

    def run(choice="required", tokens=250, **more):
        value = {"model": "base", "messages": chat("list the files"), "tools": TOOLS, "tool_choice": choice,
                 "max_tokens": tokens, "temperature": 2, **more}  # fmt: skip
        reply = call(server.url, "POST", CHAT, value)
        assert reply.status == 200, reply.json
        (found,) = reply.json["choices"]
        message = found["message"]
        assert not any(mark in (message["content"] or "") for mark in MARKS)
        return found, [one["function"] for one in message.get("tool_calls", [])]

    return run


def named(name):
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("name", ["flag", "nested", "bare", "none"])
def test_a_named_tool_is_called_once_with_its_own_properties(ask, name):
    for seed in range(4):
        found, calls = ask(named(name), seed=seed)
        assert (len(calls), calls[0]["name"], found["finish_reason"]) == (1, name, "tool_calls")
        arguments, schema = json.loads(calls[0]["arguments"]), {"flag": FLAG, "nested": NESTED}.get(name, {})
        jsonschema.validate(arguments, schema)
        assert set(arguments) <= set(schema.get("properties", {}))
        if name == "nested":
            assert all(set(inner or {}) <= {"on"} for inner in arguments.values())


def test_finished_calls_survive_a_cut_answer(ask):
    tools, counts = [tool("flag", FLAG)], {}
    for tokens in range(10, 220, 30):
        # A bias against the end of the list: calls go on until they are cut.
        found, calls = ask(tokens=tokens, tools=tools, seed=1, temperature=0, logit_bias={"4": -100})
        if found["finish_reason"] == "length":
            counts[tokens] = len(calls)
            assert all(set(json.loads(one["arguments"])) == {"on"} for one in calls)
            assert not found["message"]["content"]
    assert any(counts.values()), "no answer was cut behind a finished call"


def test_a_cut_answer_in_a_stream(server, call):
    value = {"model": "base", "messages": chat("list the files"), "tools": [tool("flag", FLAG)], "stream": True,
             "tool_choice": "required", "max_tokens": 60, "temperature": 0}  # fmt: skip
    body = call(server.url, "POST", CHAT, value).body.decode()
    assert not any(mark in body for mark in MARKS)
