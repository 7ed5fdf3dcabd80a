"""Tool calls out of answers: back and forth, in pieces, and whatever a model may write instead."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_afm.text.messages import parse_messages
from mlx_afm.text.template import TURN_END, render
from mlx_afm.text.tool_calls import Parsed, ToolCallParser, ToolCallTokenFilter, parse_tool_calls

START, END = "<executable_start>", "<executable_end>"
USER = {"role": "user", "content": "how warm is it in Paris?"}


def written(content, calls):
    """The answer as the template writes it, without the end of the turn."""
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    return render(parse_messages([USER, message], where="test"))[-1].text.removesuffix(TURN_END)


def block(text):
    return f"{START} ```function\n{text}```{END}"


def functions(parsed):
    return [call["function"] for call in parsed.calls]


def call(name, arguments):
    return {"name": name, "arguments": arguments}


def test_the_toolkits_example():
    text = 'Let me look.<executable_start> ```function\n[{"name": "weather", "arguments": {"city": "Paris"}}]```'
    content, (found,) = parse_tool_calls(f"{text}<executable_end>")
    assert content == "Let me look."
    assert found["type"] == "function"
    assert found["function"] == call("weather", '{"city": "Paris"}')
    assert found["id"].startswith("call_")


@pytest.mark.parametrize(
    "calls",
    [
        [call("now", "{}")],
        [call("now", {})],
        [call("weather", '{"city": "Orléans", "days": [1, 2.5, null, true]}'), call("now", {"a": {"b": []}})],
        [call("shell", {"command": "echo '```' && cat <<EOF\n\\ \"quoted\" [{}] <n> ``` \nEOF"})],
        [call("say", "not JSON at all")],
        [call("say", '"JSON of a text"')],
        [call("say", '"5"'), call("say", "5"), call("say", '"{\\"a\\": 1}"'), call("say", "")],
        [call('quo"te', {"ключ": "значение 🎉", "half": "\\ud83c"})],
    ],
    ids=lambda calls: calls[0]["name"],
)
@pytest.mark.parametrize("content", ["", "I look.\n\n", " ```python\nx```  "])
def test_there_and_back(calls, content):
    text = written(content, [{"function": function} for function in calls])
    parsed = parse_tool_calls(text)
    assert parsed.content == content
    assert [function["name"] for function in functions(parsed)] == [function["name"] for function in calls]
    for found, given_ in zip(functions(parsed), calls):
        if not isinstance(given_["arguments"], str):
            assert json.loads(found["arguments"]) == given_["arguments"]
    assert written(parsed.content, parsed.calls) == text
    assert functions(parse_tool_calls(written(parsed.content, parsed.calls))) == functions(parsed)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.text(max_size=9), st.lists(st.tuples(st.text(min_size=1, max_size=5), json_values), min_size=1, max_size=3))
def test_whatever_is_called(content, calls):
    body = json.dumps([call(name, {"value": value}) for name, value in calls])
    parsed = parse_tool_calls(content + block(body))
    assert parsed.content == content
    assert [(f["name"], json.loads(f["arguments"])["value"]) for f in functions(parsed)] == calls


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "[",
        "{}",
        "[1]",
        '"name"',
        "null",
        '[{"name": 3}]',
        '[{"name": ""}]',
        '[{"name": "a", "arguments": NaN}]',
        '[{"name": "a", "arguments": {}, "more": 1}]',
        '[{"arguments": {}}]',
        '[{"name": "a"}, {}]',
        '[{"name": "a"}] and more',
        '[{"name": "a", "arguments": "\\ud800"}]',
        "[" * 100_000,
        "1" * 5000,
    ],
    ids=lambda body: body[:40],
)
def test_what_is_no_call_stays_text(body):
    text = f"one {block(body)} two"
    assert parse_tool_calls(text) == Parsed(text, [])


@pytest.mark.parametrize(
    "text",
    [
        START,
        END,
        f"{START}{END}",
        f"{START} ``` {END}",
        f"{START} ````` {END}",
        START[:-1],
        f"{END}{START}",
        "",
        "a < b",
    ],
)
def test_marks_without_a_block_stay_text(text):
    assert parse_tool_calls(text) == Parsed(text, [])


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (f'{START}```function [{{"name": "a"}}] ``` {END}', "", ["a"]),
        (f'{START}```{{"name": "a"}}```{END}', "", ["a"]),
        (block('[{"name": "a"}]') + " so " + block('[{"name": "b"}]') + "!", " so !", ["a", "b"]),
        (f"{START} ```func " + block('[{"name": "a"}]'), f"{START} ```func ", ["a"]),
        (block("nothing") + block('[{"name": "a"}]'), block("nothing"), ["a"]),
        (block('[{"name": "a"}]')[: -len(END)], "", ["a"]),
        (f'so {START} ```function\n[{{"name": "a"}}, {{"name": "b"}}, {{"name": "c", "argum', "so ", ["a", "b"]),
        (f'{START}``` {{"name": "a", "arguments": {{}}}}', "", ["a"]),
        (f'{START} ```function\n[{{"name": "a", "arg', f'{START} ```function\n[{{"name": "a", "arg', []),
    ],
    ids=[
        "spaces",
        "one call",
        "two blocks",
        "begun twice",
        "after a bad one",
        "cut",
        "two of three",
        "no list",
        "none",
    ],
)
def test_the_rules(text, content, names):
    parsed = parse_tool_calls(text)
    assert parsed.content == content
    assert [function["name"] for function in functions(parsed)] == names
    assert all(function["arguments"] == "{}" for function in functions(parsed))


ANSWERS = [
    "I look. " + block('[{"name": "a", "arguments": {"x": "```"}}]') + " Then " + block('[{"name": "b"}]') + " done",
    block("[") + f"<exec {START}{START[:5]}" + block('[{"name": "c"}]') + END + "<<executable_star",
    f"a <n> b {START} never ends <executable_en",
]


@pytest.mark.parametrize("text", ANSWERS, ids=["two", "broken", "endless"])
def test_pieces_say_the_same_as_the_whole(text):
    whole, rng = parse_tool_calls(text), random.Random(0)
    for trial in range(200):
        parser, numbers, parts, place = ToolCallParser(lambda: "id"), [], [], 0
        while place < len(text):
            size = 1 if trial == 0 else rng.randint(1, 30)
            parts.append(parser.feed(text[place : place + size]))
            numbers.append(place)
            place += size
        parts.append(parser.finish())
        assert "".join(part.content for part in parts) == whole.content
        assert [function for part in parts for function in functions(part)] == functions(whole)
        assert parser.finish() == Parsed("", [])


def test_text_comes_at_once_and_a_call_with_its_block():
    parser = ToolCallParser(iter(["first", "second"]).__next__)
    assert parser.feed("Let me see. <execu") == Parsed("Let me see. ", [])
    assert parser.feed("te, then") == Parsed("<execute, then", [])
    assert parser.feed(f'{START} ```function\n[{{"name"') == Parsed("", [])
    parsed = parser.feed(f': "now"}}, {{"name": "here"}}]```{END} and')
    assert (parsed.content, [one["id"] for one in parsed.calls]) == (" and", ["first", "second"])
    assert parser.finish() == Parsed("", [])


def unmarked(text):
    """What must be left of a text, all marks taken out until there are none."""
    while START in text or END in text:
        text = text.replace(START, "").replace(END, "")
    return text


@pytest.mark.parametrize(
    "text", [*ANSWERS, f"{START[:6]}{END}{START[6:]} a <{END}exec", f"a < b{END}", "<" * 9 + START]
)
def test_no_mark_gets_through_the_filter_however_it_is_cut(text):
    rng = random.Random(1)
    for trial in range(200):
        tokens, said, place = ToolCallTokenFilter(), "", 0
        while place < len(text):
            size = 1 if trial == 0 else rng.randint(1, 12)
            said += tokens.push(text[place : place + size])
            place += size
        said += tokens.finish()
        assert said == unmarked(text)


def test_ids_differ():
    text = block(json.dumps([call("a", {})] * 50))
    assert len({one["id"] for one in parse_tool_calls(text).calls}) == 50


def test_a_long_answer_takes_no_time():
    """Endless spaces or marks, piece by piece: what was searched is not searched again."""
    for filler in (" " * 200_000, START * 5_000, "<executable_" * 10_000, f"{START} ``` " + "a " * 50_000):
        parser = ToolCallParser()
        for place in range(0, len(filler), 7):
            parser.feed(filler[place : place + 7])
        parser.finish()


def test_the_tokens_of_a_call_decode_to_it(tokenizer):
    calls = [{"function": call("weather", {"city": "Paris", "days": [1, 2, 3]})}]
    text = written("Open the valve.\n", calls)
    ids = tokenizer.encode("\n" + text)[2:]
    assert tokenizer.executable_start_id in ids
    if tokenizer.unk_id in ids:
        pytest.skip("this tokenizer has no piece for a backquote")
    parsed = parse_tool_calls(tokenizer.decode(ids))
    assert parsed.content == "Open the valve.\n"
    assert written(parsed.content, parsed.calls) == text
