"""Records of every data format to conversations."""

import json

import pytest

from conversations import ANSWER, CALL, MORE, SYSTEM, TOOLS, USER
from mlx_afm.data.data_formats import DATA_FORMATS, read_record
from mlx_afm.errors import DataError

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
RULES = {"role": "system", "content": "r"}

# data format -> records of it, with the messages and tools they stand for
RECORDS = {
    "toolkit": [
        ([ASK, SAY], [ASK, SAY], ()),
        ({"conversation": [ASK, SAY]}, [ASK, SAY], ()),
        ({"data": [ASK, SAY], "tools": TOOLS}, [ASK, SAY], TOOLS),
    ],
    "messages": [
        ({"messages": [ASK, SAY]}, [ASK, SAY], ()),
        ({"id": 7, "tools": TOOLS, "messages": [ASK, SAY]}, [ASK, SAY], TOOLS),
        ({"messages": [ASK, SAY], "tools": json.dumps(TOOLS)}, [ASK, SAY], TOOLS),
        ({"messages": [ASK, SAY], "tools": None}, [ASK, SAY], ()),
        ({"messages": [ASK, SAY], "tools": ""}, [ASK, SAY], ()),
    ],
    "prompt-completion": [
        ({"prompt": "q", "completion": "a"}, [ASK, SAY], ()),
        ({"completion": "a", "prompt": "q", "system": "r"}, [RULES, ASK, SAY], ()),
        ({"prompt": [RULES, ASK], "completion": [SAY]}, [RULES, ASK, SAY], ()),
        ({"prompt": "q", "completion": json.dumps([SAY])}, [ASK, {**SAY, "content": json.dumps([SAY])}], ()),
        ({"prompt": json.dumps([ASK]), "completion": "a"}, [{**ASK, "content": json.dumps([ASK])}, SAY], ()),
        ({"messages": None, "prompt": "q", "completion": "a", "text": None, "system": ""}, [ASK, SAY], ()),
        ({"prompt": "q", "completion": "a", "tools": TOOLS}, [ASK, SAY], TOOLS),
    ],
    "prompt-response": [
        ({"prompt": "q", "response": "a"}, [ASK, SAY], ()),
        ({"prompt": [ASK], "response": [SAY], "system": "r"}, [RULES, ASK, SAY], ()),
    ],
    "instruction": [
        ({"instruction": "q", "output": "a"}, [ASK, SAY], ()),
        ({"instruction": "q", "input": "", "output": "a", "system": "r"}, [RULES, ASK, SAY], ()),
        ({"instruction": "q", "input": None, "output": "a", "history": None}, [ASK, SAY], ()),
        ({"instruction": "", "input": "q", "output": "a", "history": ""}, [ASK, SAY], ()),
        ({"instruction": "q", "input": "i", "output": "a"}, [{**ASK, "content": "q\n\ni"}, SAY], ()),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, [ASK, SAY, ASK, SAY], ()),
        ({"instruction": "q", "output": json.dumps([SAY])}, [ASK, {**SAY, "content": json.dumps([SAY])}], ()),
    ],
    "sharegpt": [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [ASK, SAY], ()),
        (
            {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}], "system": "r"},
            [RULES, ASK, SAY],
            (),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "r"},
                    {"role": "human", "content": "q"},
                    {"from": "function_call", "value": '{"name": "look", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "found"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": json.dumps(TOOLS),
            },
            [
                RULES,
                ASK,
                {**CALL, "tool_calls": [{"function": {"name": "look", "arguments": {"a": 1}}}]},
                {"role": "tool", "content": "found"},
                SAY,
            ],
            TOOLS,
        ),
    ],
}
CALLED_TWICE = {"from": "function_call", "value": "[]", "tool_calls": [{"function": {}}]}
# The same for rows of tables, whose cells hold JSON.
ROWS = [
    ("messages", {"messages": json.dumps([ASK, SAY]), "tools": json.dumps(TOOLS)}, [ASK, SAY], TOOLS),
    ("sharegpt", {"conversations": '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'}, [ASK, SAY], ()),
    ("prompt-completion", {"prompt": json.dumps([ASK]), "completion": "a", "system": ""}, [ASK, SAY], ()),
    ("prompt-completion", {"prompt": json.dumps([RULES, ASK]), "completion": json.dumps([SAY])}, [RULES, ASK, SAY], ()),
    (
        "prompt-completion",
        {"prompt": "q", "completion": json.dumps([SAY])},
        [ASK, {**SAY, "content": json.dumps([SAY])}],
        (),
    ),
    ("instruction", {"instruction": "q", "output": "a", "history": '[["q", "a"]]'}, [ASK, SAY, ASK, SAY], ()),
]
CASES = [(data_format, *case) for data_format, cases in RECORDS.items() for case in cases]


@pytest.mark.parametrize(("data_format", "record", "messages", "tools"), CASES)
def test_a_record_is_this_conversation(data_format, record, messages, tools):
    found = read_record(record, data_format)
    assert list(found.messages) == messages
    assert list(found.tools) == list(tools)
    assert (found.text, found.data_format) == (None, data_format)


@pytest.mark.parametrize(("data_format", "record", "messages", "tools"), ROWS)
def test_a_row_of_a_table_is_this_conversation(data_format, record, messages, tools):
    found = read_record(record, in_table=True)
    assert list(found.messages) == messages
    assert list(found.tools) == list(tools)
    assert found.data_format == data_format
    named = {f"my {name}": value for name, value in record.items()}
    fields = tuple((name, f"my {name}") for name in record)
    assert read_record(named, fields=fields, in_table=True) == found


@pytest.mark.parametrize(("data_format", "record", "messages", "tools"), CASES)
def test_the_data_format_is_told_from_the_keys(data_format, record, messages, tools):
    found = read_record(record)
    assert list(found.messages) == messages
    assert list(found.tools) == list(tools)
    assert found.data_format == data_format


def test_plain_text():
    for data_format in ("auto", "text"):
        found = read_record({"text": "one\ntwo", "id": 1}, data_format)
        assert (found.text, list(found.messages), found.data_format) == ("one\ntwo", [], "text")


def test_every_data_format_is_here():
    assert {*RECORDS, "text"} == set(DATA_FORMATS)


def test_of_several_data_formats_the_one_with_most_meaning():
    record = {"text": "t", "prompt": "q", "completion": "a", "messages": [ASK, SAY]}
    assert read_record(record).data_format == "messages"
    del record["messages"]
    assert read_record(record).data_format == "prompt-completion"
    assert read_record(record, "text").text == "t"


def test_fields_by_other_names():
    fields = (("prompt", "question"), ("response", "best answer"), ("system", "rules"))
    record = {"question": "q", "best answer": "a", "rules": "r", "prompt": "no"}
    assert list(read_record(record, fields=fields).messages) == [RULES, ASK, SAY]
    assert read_record({"body": "words"}, fields=(("text", "body"),)).text == "words"
    with pytest.raises(DataError, match=r"no field 'prompt'.*expected a prompt-response record"):
        read_record({"response": "a"}, "prompt-response", (("prompt", "question"),))


def test_text_that_only_looks_like_messages_stays_text():
    for text in ('[{"a": 1}]', '[{"role": ', "[{ role", '[{"role": "user"}, 3]'):
        (ask, _) = read_record({"prompt": text, "completion": "a"}).messages
        assert ask == {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("record", "data_format", "fault", "kind"),
    [
        (3, "auto", "not a record .expected a list of messages or an object, found int", "unknown-form"),
        ([ASK], "messages", "not a record .expected a messages record, found list", "unknown-form"),
        ({}, "auto", "a record of no data format we know .*found fields none", "unknown-form"),
        ({"q": "x", "a": "y"}, "auto", "found fields 'q', 'a'.*--field prompt=question", "unknown-form"),
        ({"prompt": "q"}, "prompt-completion", "no field 'completion'", "unknown-form"),
        ({}, "instruction", "no field 'instruction' and no field 'output'", "unknown-form"),
        ({"prompt": 3, "completion": "a"}, "auto", "prompt is not text .expected a string, found int", "wrong-field"),
        ({"prompt": "q", "completion": None}, "auto", "completion is not text .*found null", "wrong-field"),
        ({"prompt": "q", "completion": "a", "system": 3}, "auto", "system is not text", "wrong-field"),
        ({"instruction": ["q"], "output": "a"}, "auto", "instruction is not text .*found list", "wrong-field"),
        ({"instruction": "q", "output": "a", "history": ["q"]}, "auto", "history has the wrong form", "wrong-field"),
        ({"instruction": "q", "output": "a", "history": "q"}, "auto", "history has the wrong form", "wrong-field"),
        ({"instruction": "q", "output": "a", "history": "[]"}, "auto", "only a cell of a table", "wrong-field"),
        ({"messages": "[]"}, "auto", "messages has the wrong form .expected a list, found JSON text", "wrong-field"),
        ({"conversations": "[]"}, "auto", "only a cell of a table holds it as text", "wrong-field"),
        ({"conversations": [{"from": "gpt", "role": "gpt", "value": "x"}]}, "auto", "'from' and 'role'", "unknown-key"),
        ({"conversations": [CALLED_TWICE]}, "auto", "calls in 'tool_calls' and as the value", "wrong-tool-call"),
        ({"conversations": "hello"}, "auto", "conversations has the wrong form", "no-messages"),
        ({"conversations": ["hello"]}, "auto", "conversations has the wrong form", "no-messages"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "auto", "unknown role", "unknown-role"),
        ({"conversations": [{"value": "x"}]}, "auto", "found no 'from'", "unknown-role"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "auto", "unknown role", "unknown-role"),
        ({"text": None}, "auto", "text is not text .*found null", "wrong-field"),
        ({"text": " \n"}, "auto", "an empty text", "empty-answer"),
    ],
)  # fmt: skip
def test_faults(record, data_format, fault, kind):
    with pytest.raises(DataError, match=fault) as error:
        read_record(record, data_format)
    assert error.value.kind == kind


def test_the_record_is_left_alone():
    record = {"prompt": [SYSTEM, USER], "completion": [ANSWER], "x": MORE}
    before = json.dumps(record)
    read_record(record)
    assert json.dumps(record) == before
