import copy

import pytest

from mlx_afm.errors import DataError
from mlx_afm.text.messages import Message, parse_messages, parse_tools, require_trainable, to_dict

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
CALLS = [{"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}]
CALL = {"role": "assistant", "content": "", "tool_calls": CALLS}
RESULT = {"role": "tool", "content": {"weather": "sun"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "City", "schema": {"type": "object"}}}
TOOLS = [{"name": "f", "parameters": {}}]
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
        [ANSWER, USER],  # a greeting
        [SYSTEM, ANSWER, USER, ANSWER],
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
        ([ANSWER], "no user message"),
        ([SYSTEM, ANSWER], "no user message"),
        ([USER, ANSWER, RESULT, ANSWER, ANSWER], "message 4: two assistant messages in a row"),
        ([RESULT, USER], "message 0: tool message in the wrong place .expected after assistant, found after nothing"),
        ([USER, SYSTEM], "message 1: a system message can only be the first"),
        ([SYSTEM, SYSTEM, USER], "message 1: a system message can only be the first"),
        ([USER, USER], "message 1: two user messages in a row"),
        ([USER, ANSWER, ANSWER], "message 2: two assistant messages in a row"),
        ([USER, CALL, RESULT, {**RESULT, "content": TOOLS}], "message 3: two tool messages in a row"),
        ([USER, CALL, {**RESULT, "response_format": FORMAT}, RESULT], "message 3: two tool messages in a row"),
        ([USER, CALL, RESULT, RESULT, RESULT, USER, USER], "message 6: two user messages in a row"),
        ([USER, RESULT], "message 1: tool message in the wrong place"),
        ([{"role": "bot", "content": ""}], "message 0: unknown role .*found 'bot'"),
        ([{"content": ""}], "found no role"),
        ([{"role": ["user"], "content": ""}], "unknown role"),
        (["hi"], "message 0: not a message .*found str"),
        ([{**USER, "wight": 1, "name": "x"}], "user': name, wight .*Did you mean 'weight' for 'wight'.* no effect"),
        ([USER, {**ANSWER, "toolcalls": 1}], "Did you mean 'tool_calls' for 'toolcalls'"),
        ([{**USER, "weight": 1}, ANSWER], "message 0: a weight for role 'user' .*found weight 1"),
        ([{**USER, "train": True}, ANSWER], "a weight for role 'user' .*found train True"),
        ([USER, {**ANSWER, "weight": -1}], "weight cannot be used .expected 0, or a number from 1e-06 .*found -1"),
        ([USER, {**ANSWER, "weight": "0"}], "weight cannot be used .*found '0'"),
        ([USER, {**ANSWER, "weight": True}], "weight cannot be used .*found True"),
        ([USER, {**ANSWER, "weight": float("nan")}], "weight cannot be used .*found nan"),
        ([USER, {**ANSWER, "weight": 10**400}], "weight cannot be used"),
        ([USER, {**ANSWER, "weight": 1e-30}], "weight cannot be used"),
        ([USER, {**ANSWER, "train": "no"}], "train cannot be used .expected true or false, found 'no'"),
        ([USER, {**ANSWER, "weight": 1, "train": False}], "weights contradict .*found weight 1, train False"),
        ([{**USER, "tool_calls": CALLS}], "unknown keys for role 'user': tool_calls"),
        ([USER, {**ANSWER, "response_format": FORMAT}], "unknown keys for role 'assistant': response_format"),
        ([{"role": "user"}], "content is not text .expected a string, or a list of .*found null"),
        ([{"role": "user", "content": 3}], "found int"),
        ([{"role": "user", "content": []}], "content is not text .*found an empty list"),
        ([{"role": "user", "content": ["a"]}], "a part of the content is not text .*found str"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a part of the content is not text .*found dict"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "not text .*found type 'image_url'"),
        ([USER, CALL, {**RESULT, "content": [{"type": "text", "text": "a"}, 1]}], "a part of .* not text .*found int"),
        ([USER, {"role": "assistant", "content": None}], "found null"),
        ([USER, CALL, {"role": "tool", "content": 3}], "a tool's content cannot be used"),
        ([USER, CALL, {"role": "tool", "content": {"a": {1}}}], "content cannot be written as JSON"),
        ([USER, {**CALL, "tool_calls": {}}], "tool_calls has the wrong form"),
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


def test_results_in_a_row_are_one_message():
    results = [{**RESULT, "tool_call_id": "1"}, {"role": "function", "content": "-3"}, {**RESULT, "content": [1]}]
    parsed = parse(USER, CALL, *results, ANSWER)
    assert [message.role for message in parsed] == ["user", "assistant", "tool", "assistant"]
    assert parsed[2].content == '{"weather": "sun"}\n-3\n[1]'


def test_null_keys_and_empty_lists_are_absent():
    nulls = dict.fromkeys(("tool_calls", "tool_call_id", "name", "tools", "response_format", "weight", "other"))
    call = {"id": None, "type": None, "function": {**CALLS[0]["function"], "description": None}}
    plain = [SYSTEM, USER, CALL, RESULT, ANSWER]
    given = [{**nulls, **message} for message in plain]
    given[0]["tools"], given[1]["tool_calls"], given[4]["tool_calls"] = [], [], []
    given[2] = {**given[2], "tool_calls": [call]}
    assert parse(*given) == parse(*plain)


def test_weights_of_answers():
    def weight(**keys):
        return parse(USER, {**ANSWER, **keys})[1].loss_weight

    assert [weight(weight=0), weight(train=False), weight(label=False), weight(label=0)] == [0, 0, 0, 0]
    assert [weight(), weight(weight=1), weight(train=True), weight(label=1, weight=None)] == [1, 1, 1, 1]
    assert [weight(weight=0.25), weight(weight=3, train=True)] == [0.25, 3]
    assert [weight(weight=1e-6), weight(weight=1e6)] == [1e-6, 1e6]
    for outside in (0.99e-6, 1_000_001):
        with pytest.raises(DataError, match="expected 0, or a number from 1e-06 to 1,000,000"):
            weight(weight=outside)
    assert parse({**USER, "weight": 0}, ANSWER) == parse({**USER, "train": False}, ANSWER) == parse(USER, ANSWER)
    assert to_dict(parse(USER, {**ANSWER, "train": False})[1]) == {**ANSWER, "weight": 0}


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
    require_trainable(parse(USER, ANSWER, USER, {**ANSWER, "content": "", "weight": 0}), "x")
    require_trainable(parse(USER, CALL, RESULT, ANSWER), "x")
    for messages, fault in [
        ([USER], "line 1: nothing to learn from"),
        ([USER, ANSWER, USER], "line 1, message 2: the conversation does not end with an answer .*found role 'user'"),
        ([USER, {**ANSWER, "content": " \n"}], "line 1, message 1: an empty answer"),
        ([USER, {**ANSWER, "content": ""}, USER, ANSWER], "line 1, message 1: an empty answer"),
        ([USER, {**ANSWER, "weight": 0}], "line 1: nothing to learn from: every assistant message has weight 0"),
    ]:
        with pytest.raises(DataError, match=fault):
            require_trainable(parse(*messages), "line 1")


def nested(levels):
    value = "leaf"
    for _ in range(levels):
        value = {"a": value}
    return value


def test_json_may_be_nested_64_levels_deep():
    assert parse(USER, CALL, {"role": "tool", "content": nested(64)}, ANSWER)[2].content == nested(64)
    with pytest.raises(DataError, match=r"content is nested too deeply .expected at most 64 levels") as error:
        parse(USER, CALL, {"role": "tool", "content": nested(65)}, ANSWER)
    assert error.value.kind == "nested-too-deeply"


def test_a_number_that_json_lacks_is_an_error_of_its_field():
    with pytest.raises(DataError, match="content cannot be written as JSON") as error:
        parse(USER, CALL, {"role": "tool", "content": {"a": float("nan")}}, ANSWER)
    assert error.value.kind == "wrong-content"
