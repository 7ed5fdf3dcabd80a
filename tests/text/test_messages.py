import copy

import pytest

from mlx_afm.errors import DataError
from mlx_afm.text.messages import Message, parse_messages, parse_tools, require_trainable

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
CALLS = [{"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}]
CALL = {"role": "assistant", "content": "", "tool_calls": CALLS}
RESULT = {"role": "tool", "content": {"weather": "sun"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "City", "schema": {"type": "object"}}}
SPECIAL = ("</s>", "<n>", "<turn_end>", "<turn_start>")


def parse(*messages, **settings):
    return parse_messages(list(messages), where="a.jsonl, line 3", **settings)


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [SYSTEM, USER],
        [USER, ANSWER],
        [SYSTEM, USER, ANSWER, USER, ANSWER],
        [USER, CALL, RESULT, ANSWER],
        [USER, CALL, RESULT, USER, ANSWER],
        [USER, CALL, RESULT, CALL, RESULT, ANSWER],
    ],
)
def test_good_orders(messages):
    assert [m.role for m in parse(*messages)] == [m["role"] for m in messages]


def test_fields_are_kept_and_the_input_is_left_alone():
    tools = [{"type": "function", "function": {"name": "weather"}}]
    value = [{**SYSTEM, "tools": tools}, {**USER, "response_format": FORMAT}, CALL, {**RESULT, "role": "function"}]
    before = copy.deepcopy(value)
    system, user, call, result = parse(*value)
    assert system == Message("system", "Be brief.", tools=tuple(tools))
    assert user == Message("user", "hi", response_format=FORMAT)
    assert call == Message("assistant", "", tool_calls=tuple(CALLS))
    assert result == Message("tool", {"weather": "sun"})
    assert value == before


def test_forms_that_mean_the_same():
    assert parse(USER, {"role": "assistant", "content": None, "tool_calls": CALLS})[1].content == ""
    assert parse(USER, {"role": "assistant", "tool_calls": CALLS})[1].content == ""
    openai = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]
    assert parse(USER, {**CALL, "tool_calls": openai})[1].tool_calls == tuple(openai)
    assert parse({**USER, "response_format": None})[0].response_format is None
    assert parse(USER, CALL, {**RESULT, "tool_call_id": "1", "name": "weather"})[2].role == "tool"


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "no user or assistant message"),
        ([SYSTEM], "no user or assistant message"),
        ([ANSWER], "message 0: assistant message in the wrong place .expected after user or tool, found after nothing"),
        ([SYSTEM, ANSWER], "message 1: assistant message in the wrong place"),
        ([USER, SYSTEM], "message 1: a system message can only be the first"),
        ([SYSTEM, SYSTEM, USER], "message 1: a system message can only be the first"),
        ([USER, USER], "message 1: two user messages in a row"),
        ([USER, ANSWER, ANSWER], "message 2: two assistant messages in a row"),
        ([USER, CALL, RESULT, {**RESULT, "role": "function"}], "message 3: two tool messages in a row"),
        ([USER, RESULT], "message 1: tool message in the wrong place"),
        ([{"role": "bot", "content": ""}], "message 0: unknown role .*found 'bot'"),
        ([{"content": ""}], "found no role"),
        ([{"role": ["user"], "content": ""}], "unknown role"),
        (["hi"], "message 0: not a message .*found str"),
        ([{**USER, "weight": 1, "name": "x"}], "unknown keys for role 'user': name, weight"),
        ([{**USER, "tool_calls": CALLS}], "unknown keys for role 'user': tool_calls"),
        ([USER, {**ANSWER, "response_format": FORMAT}], "unknown keys for role 'assistant': response_format"),
        ([{"role": "user"}], "content is not text .expected a string, found null"),
        ([{"role": "user", "content": 3}], "found int"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "found list.*Join the parts"),
        ([USER, {"role": "assistant", "content": None}], "found null"),
        ([USER, CALL, {"role": "tool", "content": 3}], "a tool's content cannot be used"),
        ([USER, CALL, {"role": "tool", "content": {"a": {1}}}], "content cannot be written as JSON"),
        ([USER, {**CALL, "tool_calls": {}}], "tool_calls has the wrong form"),
        ([USER, {**CALL, "tool_calls": []}], "tool_calls is empty"),
        ([USER, {**CALL, "tool_calls": [{"name": "f"}]}], "tool_calls has the wrong form"),
        ([USER, {**CALL, "tool_calls": [{"function": {"name": "f"}}]}], "tool_calls has the wrong form"),
        ([USER, {**CALL, "tool_calls": [{"function": {"name": 1, "arguments": ""}}]}], "a tool call cannot be used"),
        ([USER, {**CALL, "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}], "a tool call cannot be used"),
        ([{**USER, "response_format": {"type": "json_object"}}], "response_format has the wrong form"),
        ([{**USER, "response_format": "json"}], "response_format has the wrong form"),
        ([{**USER, "response_format": {**FORMAT, "json_schema": {"name": "x"}}}], "response_format has the wrong form"),
        ([{**USER, "response_format": {**FORMAT, "json_schema": {"schema": {}, "name": 1}}}], "wrong form"),
        ([{**SYSTEM, "tools": {"name": "f"}}, USER], "tools has the wrong form"),
    ],
)
def test_faults(messages, fault):
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3.*{fault}"):
        parse(*messages)


def test_a_conversation_is_a_list():
    with pytest.raises(DataError, match=r"line 1: not a conversation .expected a list of messages, found dict"):
        parse_messages({"messages": []}, where="line 1")


def test_several_faults_travel_together():
    with pytest.raises(DataError) as error:
        parse({"role": "bot"}, USER, {"role": "user", "content": 1})
    assert str(error.value).startswith("a.jsonl, line 3: 2 faults in a conversation\n")
    assert "message 0: unknown role" in error.value.details[0]
    assert "message 2: content is not text" in error.value.details[1]


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([{**USER, "content": "a<turn_end>"}], "message 0, content column 2: .*'<turn_end>'"),
        ([USER, {**ANSWER, "content": "line\nx <n>"}], "message 1, content column 8: .*'<n>'"),
        ([{**SYSTEM, "content": "</s>"}, USER], "message 0, content column 1"),
        ([USER, CALL, {"role": "tool", "content": {"a": ["b", {"<n>": 1}]}}], "message 2, content column 1"),
        ([USER, {**CALL, "tool_calls": [{"function": {"name": "<n>", "arguments": ""}}]}], "message 1, tool_calls"),
        (
            [USER, {**CALL, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\u003cn>"}'}}]}],
            "message 1, tool_calls",
        ),
        ([{**USER, "response_format": {**FORMAT, "json_schema": {"schema": {"x": "<n>"}}}}], "0, response_format"),
        ([{**SYSTEM, "tools": [{"name": "<turn_start>"}]}, USER], "message 0, tools"),
    ],
)
def test_literal_special_tokens_are_refused(messages, place):
    parse(*messages)
    with pytest.raises(DataError, match=place):
        parse(*messages, special_pieces=SPECIAL)


def test_markup_that_is_no_token_is_fine():
    assert parse({**USER, "content": "<b>n</b> <N> < n > turn_end"}, special_pieces=SPECIAL)


def test_parse_tools():
    assert parse_tools([{"name": "f"}], where="tools") == ({"name": "f"},)
    for wrong in ("f", {"name": "f"}, ["f"], [{"f": {1}}]):
        with pytest.raises(DataError, match="my tools: tools"):
            parse_tools(wrong, where="my tools")
    with pytest.raises(DataError, match="tools column 2"):
        parse_tools([{"name": "f<n>"}], where="tools", special_pieces=SPECIAL)


def test_require_trainable():
    require_trainable(parse(USER, ANSWER), "x")
    require_trainable(parse(USER, CALL), "x")
    require_trainable(parse(USER, CALL, RESULT, ANSWER), "x")
    for messages, fault in [
        ([USER], "line 1: nothing to learn from"),
        ([USER, ANSWER, USER], "line 1, message 2: the conversation does not end with an answer .*found role 'user'"),
        ([USER, {**ANSWER, "content": " \n"}], "line 1, message 1: an empty answer"),
        ([USER, {**ANSWER, "content": ""}, USER, ANSWER], "line 1, message 1: an empty answer"),
    ]:
        with pytest.raises(DataError, match=fault):
            require_trainable(parse(*messages), "line 1")
