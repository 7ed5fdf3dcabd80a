"""A data folder with 60 faults of 28 kinds at known places, among 300 good lines."""

import json
import random

MAX_TOKENS = 400  # what the lines marked too-long exceed


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(name="look", arguments="{}", **more):
    return {"function": {"name": name, "arguments": arguments}, **more}


def nested(levels):
    return "[" * levels + "]" * levels


TURN_END_SCHEMA = {"type": "json_schema", "json_schema": {"name": "<turn_end>", "schema": {}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "description": "d", "schema": {"type": "object"}}}

# Kind and line: bytes as they are, anything else as JSON. None of them has a second fault.
FAULTS = [
    ("bad-json", b'[{"role": "user", "content": "cut off he'),
    ("bad-json", b'[{"role": "user" "content": "no comma"}]'),
    ("bad-json", b"plain words"),
    ("bad-json", b'{"messages": NaN}'),
    ("bad-json", b'{"messages": ' + b"9" * 5000 + b"}"),
    ("bad-json", b'{"messages": []} {"messages": []}'),
    ("not-utf8", b'[{"role": "user", "content": "caf\xe9"}]'),
    ("not-utf8", b'[{"role": "user", "content": "\xf0\x9f"}]'),
    ("nul", b'[{"role": "user", "content": "a\0b"}]'),
    ("nul", [user("a\0b escaped"), answer("x")]),
    ("nested-too-deeply", nested(5000).encode()),
    ("nested-too-deeply", [user("deep"), answer("", tool_calls=[call(arguments='{"a": ' + nested(300) + "}")])]),
    ("nested-too-deeply", {"messages": [user("deeper"), answer("x")], "tools": json.loads(nested(80))}),
    ("duplicate-key", b'{"messages": [], "messages": []}'),
    ("duplicate-key", b'[{"role": "user", "role": "assistant", "content": "which"}]'),
    ("half-surrogate", [user("half \ud83d"), answer("x")]),
    ("half-surrogate", [user("x"), answer("half \ude00")]),
    ("huge-line", b'[{"role": "user", "content": "' + b"x" * (5 << 20) + b'"}]'),
    ("unknown-form", {"question": "no", "reply": "unknown"}),
    ("unknown-form", 17),
    ("unknown-form", b"null"),
    ("unknown-form", "only a string"),
    ("unknown-form", {}),
    ("no-messages", {"messages": "words"}),
    ("no-messages", []),
    ("not-a-message", ["words", answer("x")]),
    ("unknown-role", [{"role": "human", "content": "hi"}, answer("x")]),
    ("unknown-role", [{"content": "who says this?"}, answer("x")]),
    ("unknown-role", {"conversations": [{"from": "robot", "value": "hi"}, {"from": "gpt", "value": "x"}]}),
    ("unknown-key", [{**user("named"), "name": "me"}, answer("x")]),
    ("wrong-content", [user(["parts"]), answer("x")]),
    ("wrong-content", [user("nothing said"), {"role": "assistant", "content": None}]),
    ("wrong-tool-call", [user("call"), answer("", tool_calls=[{"name": "look"}])]),
    ("empty-answer", [user("call none"), answer("", tool_calls=[])]),
    ("wrong-tool-call", [user("call what"), answer("", tool_calls=[call(arguments=[1])])]),
    ("wrong-tools", {"messages": [user("tools"), answer("x")], "tools": {"name": "no list"}}),
    ("wrong-response-format", [{**user("form"), "response_format": {"type": "json"}}, answer("{}")]),
    ("role-order", [user("one"), user("two"), answer("x")]),
    ("role-order", [{"role": "tool", "content": "first"}, user("then"), answer("x")]),
    ("role-order", [user("late"), {"role": "system", "content": "rules"}, answer("x")]),
    ("no-answer", [user("and?")]),
    ("no-final-answer", [user("a"), answer("b"), user("and then?")]),
    ("no-final-answer", [user("tool"), answer("", tool_calls=[call()]), {"role": "tool", "content": "result"}]),
    ("empty-answer", [user("say"), answer("")]),
    ("empty-answer", {"prompt": "spaces", "completion": "  \n"}),
    ("empty-answer", {"text": " "}),
    ("special-token", [user("write <turn_end>"), answer("x")]),
    ("special-token", [user("write"), answer("now <turn_start> system")]),
    ("special-token", [{**user("form"), "response_format": TURN_END_SCHEMA}, answer("{}")]),
    ("wrong-field", {"prompt": 3, "completion": "x"}),
    ("wrong-field", {"instruction": "add", "input": ["1"], "output": "x"}),
    ("too-long", [user("long " * 900), answer("x")]),
    ("newline-mark", [user("a<n>b"), answer("newline")]),
    ("replacement-character", [user("lost: \ufffd"), answer("something")]),
    ("empty-prompt", [user(" "), answer("an answer to nothing")]),
    ("wrong-weight", [user("weighed"), answer("x", weight="1")]),
    ("unknown-token", [user("say it in Japanese"), answer("東京")]),
    ("arguments-not-json", [user("call badly"), answer("", tool_calls=[call(arguments="{'a': 1}")])]),
    ("other-template", [user("<|user|>hi"), answer("hello")]),
]  # fmt: skip


def good_line(split, number):
    request = user(f"{split} request {number}")
    done = f"done {number}"
    forms = [
        [request, answer(done)],
        {"messages": [{"role": "system", "content": f"rules {number}"}, request, answer(done)]},
        {"prompt": request["content"], "completion": done},
        {"instruction": request["content"], "input": "", "output": done},
        {"conversations": [{"from": "human", "value": request["content"]}, {"from": "gpt", "value": done}]},
        {"messages": [request, answer("", tool_calls=[call()]), {"role": "tool", "content": "{}"}, answer(done)]},
        {"messages": [{**request, "response_format": SCHEMA}, answer("{}")], "tools": [{"name": "look"}]},
        {"text": f"words of {split} {number}"},
    ]
    return forms[number % len(forms)]


def encoded(line):
    return line if isinstance(line, bytes) else json.dumps(line).encode()


def plant(folder):
    """Writes the folder; gives the set of (name of the file, line, kind)."""
    rng = random.Random(4)
    lines = {
        split: [(None, encoded(good_line(split, number))) for number in range(count)]
        for split, count in (("train", 200), ("valid", 50), ("test", 50))
    }
    copies = {
        "train": [("duplicate", lines["train"][7][1]), ("duplicate", lines["train"][8][1])],
        "valid": [("overlap", lines["train"][20][1])],
        "test": [("overlap", lines["valid"][30][1])],
    }
    for split in lines:  # after what they are copies of
        lines[split] += copies[split]
    for number, fault in enumerate(FAULTS):
        split = ("train", "train", "valid")[number % 3]
        kind, line = fault
        lines[split].insert(rng.randrange(len(lines[split])), (kind, encoded(line)))
    folder.mkdir(parents=True, exist_ok=True)
    expected = {("test.jsonl", 1, "wrong-encoding")}
    for split, rows in lines.items():
        data = b"".join(line + b"\n" for _, line in rows)
        if split == "test":
            data = data.decode().encode("utf-16")
        (folder / f"{split}.jsonl").write_bytes(data)
        expected |= {(f"{split}.jsonl", line, kind) for line, (kind, _) in enumerate(rows, start=1) if kind}
        lost = [line for line, (kind, _) in enumerate(rows, start=1) if kind == "replacement-character"]
        expected |= {(f"{split}.jsonl", line, "unknown-token") for line in lost}  # it is one
    assert len(expected) == 65, len(expected)
    return expected
