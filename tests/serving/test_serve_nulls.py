"""null in a request is as good as absent, wherever a client's objects have it."""

from serving_client import chat

CHAT = "/v1/chat/completions"


def test_null_is_absent(server, call):
    def answer(messages, **more):
        value = {"model": "base", "messages": messages, "max_tokens": 4, **more}
        reply = call(server.url, "POST", CHAT, value)
        assert reply.status == 200, reply.json
        return reply.json["choices"], reply.json["usage"]["prompt_tokens"]

    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    calls = [{"id": "c1", "type": "function", "function": function}]
    asked = [*chat("weather?"), {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "-3"}]
    nulls = [{**message, "tool_calls": message.get("tool_calls"), "name": None, "refusal": None} for message in asked]
    nulls[0]["tool_calls"] = nulls[1]["tool_calls"] = []
    nulls[2]["tool_calls"] = [{**calls[0], "index": None}]
    tool = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": tool}]
    odd = [{"type": "function", "cache_control": None, "function": {**tool, "description": None, "strict": None}}]
    options = {"stop": None, "seed": None, "logit_bias": None, "stream_options": None, "tool_choice": None}
    form = {"type": "text", "json_schema": None}
    assert answer(nulls, tools=odd, response_format=form, **options) == answer(asked, tools=tools)
