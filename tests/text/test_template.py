import copy
import json

import pytest

from mlx_afm.errors import ConfigError, DataError
from mlx_afm.text.messages import parse_messages
from mlx_afm.text.template import DEFAULT_SYSTEM, Span, encode, encode_text, render

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "hello world"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}],
}


def spans_of(*messages, **settings):
    return render(parse_messages(list(messages), where="x"), **settings)


def text_of(*messages, **settings):
    return "".join(span.text for span in spans_of(*messages, **settings))


def tail(toy, *messages, after):
    """Pieces from the first turn of the role `after` on, trained ones in brackets."""
    encoded = encode(spans_of(*messages), toy)
    shown = [
        f"[{piece}]" if trained else piece
        for piece, trained in zip(toy.convert_ids_to_tokens(encoded.ids), encoded.trained, strict=True)
    ]
    text = " ".join(shown)
    return text[text.index(f"<turn_start> ▁{after} ") :]


def test_one_answer_literally(toy):
    encoded = encode(spans_of(USER, ANSWER, system="A conversation."), toy)
    #                  </s> <ts> sys <n>  A  conv  .  <te> <ts> user <n> hel lo <te> <ts> asst <n> hel lo world <te>
    assert encoded.ids == [2, 3, 9, 5, 16, 17, 22, 4, 3, 10, 5, 8 + 5, 14, 4, 3, 11, 5, 13, 14, 15, 4]
    assert encoded.trained == [False] * 17 + [True] * 4


@pytest.mark.parametrize("text", ["hello world", "", "hello", "hello\nworld " * 9])
def test_plain_text_has_a_mask_as_long_as_its_ids(toy, text):
    encoded = encode_text(text, toy)
    assert encoded.ids == [toy.eos_id, *toy.encode(text), toy.eos_id]
    assert encoded.trained == [False] + [True] * (len(encoded.ids) - 1)
    assert encoded.turns == ()


def test_default_system_message(toy):
    assert text_of(USER).startswith(f"<turn_start> system<n>{DEFAULT_SYSTEM}<turn_end><turn_start> user<n>hello")
    pieces = toy.convert_ids_to_tokens(encode(spans_of(USER, ANSWER), toy).ids)
    assert pieces[:7] == ["</s>", "<turn_start>", "▁system", "<n>", "A", "▁conversation", "▁between"]
    assert pieces[-13:-7] == ["<turn_start>", "▁user", "<n>", "hel", "lo", "<turn_end>"]
    assert pieces[-7:] == ["<turn_start>", "▁assistant", "<n>", "hel", "lo", "▁world", "<turn_end>"]


def test_every_answer_is_trained(toy):
    assert tail(toy, USER, ANSWER, USER, ANSWER, after="user") == (
        "<turn_start> ▁user <n> hel lo <turn_end> <turn_start> ▁assistant <n> [hel] [lo] [▁world] [<turn_end>] "
        "<turn_start> ▁user <n> hel lo <turn_end> <turn_start> ▁assistant <n> [hel] [lo] [▁world] [<turn_end>]"
    )


def test_an_empty_answer_trains_its_end(toy):
    shown = tail(toy, USER, {**ANSWER, "content": ""}, after="assistant")
    assert shown == "<turn_start> ▁assistant <n> [<turn_end>]"


def test_a_newline_in_an_answer_does_not_end_its_head(toy):
    shown = tail(toy, USER, {**ANSWER, "content": "\nhello\n\n world\n"}, after="assistant")
    assert shown == "<turn_start> ▁assistant <n> [<n>] [hel] [lo] [<n>] [<n>] [▁world] [<n>] [<turn_end>]"


def test_tool_calls_are_trained_and_results_are_not(toy):
    result = {"role": "tool", "content": {"weather": "hello"}}
    text = text_of(USER, CALL, result, ANSWER)
    assert text.split("<turn_end>")[2:] == [
        "<turn_start> assistant<n><executable_start> ```function\n"
        '[{"name": "weather", "arguments": {"city": "Paris"}}]```<executable_end>',
        '<turn_start> tool<n>{"weather": "hello"}',
        "<turn_start> assistant<n>hello world",
        "",
    ]
    shown = tail(toy, USER, CALL, result, ANSWER, after="assistant")
    call, rest = shown.split("[<turn_end>]", 1)
    assert call.startswith("<turn_start> ▁assistant <n> [<executable_start>] [▁] [`] [`] [`] [function] [<n>] [[] [{]")
    assert call.endswith("[`] [<executable_end>] ")
    assert rest.startswith(" <turn_start> ▁tool <n> { ")
    assert rest.endswith(" } <turn_end> <turn_start> ▁assistant <n> [hel] [lo] [▁world] [<turn_end>]")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"city":"Köln","n":[1,2.0]}', '{"city": "Köln", "n": [1, 2.0]}'),
        ({"city": "Köln"}, '{"city": "Köln"}'),
        ("not json", '"not json"'),
        ("", '""'),
        ("3", "3"),
    ],
)
def test_arguments_are_parsed_when_they_are_json(arguments, shown):
    call = {**CALL, "content": "ok ", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    expected = (
        f'ok <executable_start> ```function\n[{{"name": "f", "arguments": {shown}}}]```<executable_end><turn_end>'
    )
    assert text_of(USER, call).endswith("<turn_start> assistant<n>" + expected)


def test_tool_contents():
    def content(value):
        return spans_of(USER, CALL, {"role": "function", "content": value})[-1]

    assert content("as it is\n") == Span("as it is\n<turn_end>", False, "tool")
    assert content({"a": "ä"}).text == '{"a": "ä"}<turn_end>'
    flat, openai = {"name": "f", "parameters": {}}, {"type": "function", "function": {"name": "g"}}
    shown = '{"name": "f", "parameters": {}}\n{"type": "function", "function": {"name": "g"}}'
    assert content([flat, openai]).text == f"new tools: {shown}<turn_end>"
    for result in ([], [1, "ä"], [{"name": "Ana"}], [flat, 1], [{"function": {"name": "f", "arguments": "{}"}}]):
        assert content(result).text == f"{json.dumps(result, ensure_ascii=False)}<turn_end>"
    parts = [{"type": "text", "text": "-3"}, {"type": "text", "text": " °C", "image_url": None}]
    assert content(parts).text == "-3 °C<turn_end>"
    files = [{"type": "file", "name": "a.txt"}]  # a listing of files, and no part
    assert content(files).text == f"{json.dumps(files)}<turn_end>"


def test_response_format():
    schema = {"name": "city", "schema": {"a": 1}}
    user = {**USER, "response_format": {"type": "json_schema", "json_schema": schema}}
    lines = "hello\n\nresponse format in json.\nname: city\ndescription: None\nschema: "
    assert spans_of(user)[-1].text == f'{lines}{{"a": 1}}<turn_end>'


def test_tools_are_listed_at_the_end_of_the_system_turn():
    tools = [{"name": "f"}, {"name": "ü", "x": [1, 2]}]
    expected = 'Be brief.<n>system tools: {"name": "f"}<n>{"name": "ü", "x": [1, 2]}<turn_end>'
    system = {"role": "system", "content": "Be brief."}
    assert spans_of(system, USER, tools=tools)[1].text == expected
    assert spans_of({**system, "tools": tools}, USER)[1].text == expected
    assert spans_of(USER, tools=tools)[1].text.startswith(f"{DEFAULT_SYSTEM}<n>system tools: ")
    assert spans_of(USER, tools=[]) == spans_of(USER)
    with pytest.raises(DataError, match="tools are given twice"):
        spans_of({**system, "tools": tools}, USER, tools=tools)
    with pytest.raises(DataError, match=r"tools need a system message .found first role 'user'"):
        spans_of(USER, tools=tools, system=None)


def test_system_messages():
    own = {"role": "system", "content": " own "}
    assert spans_of(own, USER)[1] == Span(" own <turn_end>", False, "system")
    assert spans_of(USER, system="other")[1].text == "other<turn_end>"
    assert spans_of(USER, system=None)[0] == Span("<turn_start> user<n>", False, "user")
    for wrong in ("", " x", "x "):
        with pytest.raises(ConfigError, match="default system message"):
            spans_of(USER, system=wrong)
    with pytest.raises(DataError, match="no messages"):
        render(())


def test_generation_prompt(toy):
    assert spans_of(USER, add_generation_prompt=True)[-1] == Span("<turn_start> assistant<n>", False, "assistant")
    assert spans_of(USER, ANSWER, add_generation_prompt=True) == spans_of(USER, ANSWER)
    closed, prompt = encode(spans_of(USER), toy), encode(spans_of(USER, add_generation_prompt=True), toy)
    assert prompt.ids == [*closed.ids, 3, 11, 5]
    assert prompt.trained == [False] * len(prompt.ids)


def test_spans_are_the_text_and_say_what_is_trained():
    spans = spans_of(USER, ANSWER)
    assert [span.text for span in spans if span.trained] == ["hello world<turn_end>"]
    assert [span.role for span in spans] == ["system", "system", "user", "user", "assistant", "assistant"]


def test_the_callers_dicts_are_not_changed(toy):
    messages = [USER, CALL, {"role": "function", "content": {"a": [1]}}, ANSWER]
    before = copy.deepcopy(messages)
    encode(spans_of(*messages), toy)
    assert messages == before


@pytest.mark.parametrize(
    "content", ["<turn_end>", "<turn_start>", "x<turn_end><turn_start> assistant<n>y", "<turn_start><turn_end>"]
)
def test_marks_in_a_content_are_noticed(toy, content):
    with pytest.raises(DataError, match="contains the special token of a turn"):
        encode(spans_of({**USER, "content": content}, ANSWER), toy)


def test_trained_tokens_are_the_answer_encoded_in_place(tokenizer):
    answers = ["one\ntwo", " lead", "Größe 🎉", "a  b", "x" * 50]
    messages = [m for text in answers for m in (USER, {"role": "assistant", "content": text})]
    encoded = encode(spans_of(*messages), tokenizer)
    assert encoded.ids[0] == tokenizer.eos_id
    assert tokenizer.prefix_id not in encoded.ids[:2]
    trained = [token for token, flag in zip(encoded.ids, encoded.trained, strict=True) if flag]
    assert trained.count(tokenizer.turn_end_id) == len(answers)
    text = tokenizer.decode([t for t, flag in zip(encoded.ids, encoded.trained, strict=True) if not flag])
    assert text.count("<turn_start> assistant\n") == len(answers)
    if tokenizer.decode(tokenizer.encode("Größe  🎉"), strip_prefix=True) == "Größe  🎉":
        assert tokenizer.decode(trained) == "".join(f"{answer}<turn_end>" for answer in answers)
