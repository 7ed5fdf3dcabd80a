"""What a record of data means: which turns are trained and how much, and what is text. Through commands alone."""

import json
import math

import pytest

import mlx_afm

USER, ANSWER = {"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Lyon"}
AGAIN, RIGHT = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "No: Paris."}
CALL = {"function": {"name": "weather", "arguments": "{}"}}
ASK, CALLS = {"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}
COLD = {"role": "assistant", "content": "It is -3."}


@pytest.fixture
def write(tmp_path):
    """A function that writes records, a line each."""

    def write_lines(*records, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write_lines


@pytest.fixture
def shown(cli, model_folder):
    """A function that gives the texts of a file's first example as the model sees them, trained ones and others."""

    def show(path, *options):
        chosen = options or ("-n", 1)
        (example,) = cli("data", "render", path, "--model", model_folder, "--json", *chosen).json["examples"]
        texts = [(part["text"], part["trained"]) for part in example["texts"]]
        return "".join(text for text, _ in texts), [text for text, trained in texts if trained]

    return show


def sharegpt(*turns):
    names = {"user": "human", "assistant": "gpt"}
    rename = {"role": "from", "content": "value"}
    turns = [{**turn, "role": names[turn["role"]]} for turn in turns]
    return {"conversations": [{rename.get(key, key): value for key, value in turn.items()} for turn in turns]}


FORMATS = {
    "toolkit": lambda *turns: list(turns),
    "messages": lambda *turns: {"messages": list(turns)},
    "prompt-completion": lambda *turns: {"prompt": list(turns[:-1]), "completion": [turns[-1]]},
    "prompt-response": lambda *turns: {"prompt": list(turns[:-1]), "response": [turns[-1]]},
    "sharegpt": sharegpt,
}


@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}, {"label": False}], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_a_turn_of_weight_0_is_not_trained(form, key, write, shown):
    path = write(FORMATS[form](USER, {**ANSWER, **key}, AGAIN, {**RIGHT, "weight": 1}))
    text, trained = shown(path)
    assert "Lyon<turn_end>" in text
    assert trained == ["No: Paris.<turn_end>"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_key_that_would_have_no_effect_is_refused_in_every_format(form, write, cli):
    path = write(FORMATS[form](USER, {**ANSWER, "wieght": 0}, AGAIN, RIGHT))
    ran = cli("data", "check", path, "--json")
    assert ran.code == 3
    (problem,) = json.loads(ran.out)["problems"]
    assert problem["kind"] == "unknown-key"
    assert "message 1: unknown keys for role 'assistant': wieght" in problem["message"]
    assert "Did you mean 'weight' for 'wieght'?" in problem["message"]


def test_weights_reach_the_loss(write, model_folder):
    def score(first, second, name):
        turns = (USER, {**ANSWER, "weight": first}, AGAIN, {**RIGHT, "weight": second})
        return mlx_afm.score(model_folder, None, write({"messages": turns}, name=name))

    one, other, both = score(1, 0, "a.jsonl"), score(0, 1, "b.jsonl"), score(3, 0.5, "c.jsonl")
    weighted = 3 * one.loss * one.tokens + 0.5 * other.loss * other.tokens
    assert not math.isclose(one.loss, other.loss, rel_tol=0.01)
    assert both.loss == pytest.approx(weighted / (3 * one.tokens + 0.5 * other.tokens), rel=1e-5)


def test_weights_survive_the_cache_and_mixed_files(write, model_folder, tmp_path):
    records = [{"messages": [USER, {**ANSWER, "weight": weight}]} for weight in (1, 0.25)]
    path, cache = write(*records, {"messages": [USER, RIGHT]}, name="test.jsonl"), tmp_path / "cache"
    scores = [mlx_afm.score(model_folder, None, path, cache=cache) for _ in range(2)]
    assert scores[0] == scores[1] == mlx_afm.score(model_folder, None, path)
    parts = [
        mlx_afm.score(model_folder, None, write({"messages": [USER, a]}, name="one.jsonl")) for a in (ANSWER, RIGHT)
    ]
    (lyon, paris), tokens = parts, 1.25 * parts[0].tokens + parts[1].tokens
    expected = (1.25 * lyon.loss * lyon.tokens + paris.loss * paris.tokens) / tokens
    assert scores[0].loss == pytest.approx(expected, rel=1e-5)


def test_a_conversation_without_a_trained_turn_is_refused(write, cli):
    ran = cli("data", "check", write({"messages": [USER, {**ANSWER, "weight": 0}]}), "--json")
    (problem,) = json.loads(ran.out)["problems"]
    assert problem["kind"] == "no-answer"
    assert "every assistant message has weight 0" in problem["message"]


def test_converting_keeps_weights(write, cli, shown, tmp_path):
    path = write({"messages": [USER, {**ANSWER, "train": False}, AGAIN, {**RIGHT, "weight": 0.5}]})
    for data_format in ("sharegpt", "prompt-completion", "toolkit"):
        target = tmp_path / f"{data_format}.jsonl"
        assert cli("data", "convert", path, target, "--to", data_format, "--json").json["records"] == 1
        assert shown(target) == shown(path)


def test_calls_in_a_turn_of_sharegpt_are_kept(write, shown):
    turns = (ASK, {**CALLS, "content": "Let me see. "})
    assert shown(write(sharegpt(*turns), name="a.jsonl")) == shown(write({"messages": turns}, name="b.jsonl"))
    assert '"name": "weather"' in shown(write(sharegpt(*turns), name="a.jsonl"))[0]


PARTS = [{"type": "text", "text": "-3"}, {"type": "text", "text": " C"}]


@pytest.mark.parametrize("result", [PARTS, "-3 C"], ids=["parts", "text"])
def test_the_result_of_a_tool_may_come_in_parts(result, write, shown):
    tool = {"role": "tool", "tool_call_id": "c1", "content": result}
    text, trained = shown(write({"messages": [ASK, CALLS, tool, COLD]}))
    assert "<turn_start> tool\n-3 C<turn_end>" in text
    assert "new tools" not in text
    assert trained[-1] == "It is -3.<turn_end>"


@pytest.mark.parametrize(
    ("content", "rendered"),
    [
        ([{"city": "Oslo", "t": -3}], '[{"city": "Oslo", "t": -3}]'),
        ([{"name": "Ana"}], '[{"name": "Ana"}]'),
        ([], "[]"),
        ([{"name": "f", "parameters": {}}], 'new tools: {"name": "f", "parameters": {}}'),
        (
            [{"type": "function", "function": {"name": "f"}}],
            'new tools: {"type": "function", "function": {"name": "f"}}',
        ),
    ],
)
def test_new_tools_are_told_from_results_by_their_form(content, rendered, write, shown):
    text, _ = shown(write({"messages": [ASK, CALLS, {"role": "tool", "content": content}, COLD]}))
    assert f"<turn_start> tool\n{rendered}<turn_end>" in text


def test_several_results_in_a_row_are_one_turn(write, shown):
    results = [{"role": "tool", "content": content} for content in ("cold", {"t": 20}, PARTS)]
    text, _ = shown(write({"messages": [ASK, CALLS, *results, COLD]}))
    assert '<turn_start> tool\ncold\n{"t": 20}\n-3 C<turn_end>' in text


def test_files_of_prompts_are_read_like_data(write, cli, model_folder, tmp_path):
    tool = {"role": "tool", "content": PARTS}
    forms = {
        "plain": [ASK, CALLS, {**tool, "content": "-3 C\n-3 C"}],
        "parts": [ASK, {**CALLS, "weight": 0}, tool, {**tool, "role": "function"}, COLD],
        "nulls": [{**ASK, "tool_calls": None}, CALLS, tool, {**tool, "name": None}],
    }
    found = {}
    for name, messages in forms.items():
        path, output = write({"messages": messages}, name=f"{name}.jsonl"), tmp_path / f"{name}-answers.jsonl"
        assert cli("generate", "--model", model_folder, "--prompt", path, "--output", output, "-m", 2).code == 0
        found[name] = json.loads(output.read_text(encoding="utf-8"))["prompt_tokens"]
    assert len(set(found.values())) == 1, found


SILENT = json.dumps([{"role": "assistant", "content": "I am a bot."}])
LOUD = json.dumps([{"name": "Ana", "role": "nurse"}])


@pytest.mark.parametrize("answer", [SILENT, LOUD])
@pytest.mark.parametrize(
    "record",
    [{"prompt": "p", "completion": ""}, {"prompt": "p", "response": ""}, {"instruction": "p", "output": ""}],
    ids=str,
)
def test_an_answer_that_is_json_is_a_text(record, answer, write, shown):
    path = write({name: value or answer for name, value in record.items()})
    assert shown(path)[1] == [f"{answer}<turn_end>"]


def test_a_prompt_and_a_history_that_are_json_are_texts(write, shown):
    request = json.dumps([{"role": "user", "content": "x"}])
    record = {"instruction": request, "output": "y", "history": [[request, SILENT]]}
    text, trained = shown(write(record))
    assert text.count(f"<turn_start> user\n{request}<turn_end>") == 2
    assert trained == [f"{SILENT}<turn_end>", "y<turn_end>"]


def test_a_cell_of_a_table_may_hold_a_list(tmp_path, shown, cli):
    def quoted(value):
        return '"' + json.dumps(value).replace('"', '""') + '"'

    table = tmp_path / "a.csv"
    table.write_text(f"prompt,completion\n{quoted([USER])},{quoted([RIGHT])}\nWrite a message.,{quoted([RIGHT])}\n")
    assert shown(table)[1] == ["No: Paris.<turn_end>"]
    assert shown(table, "--line", 3)[1] == [f"{json.dumps([RIGHT])}<turn_end>"]
    # A copy as JSON lines says the same: there a list is a list.
    copy = tmp_path / "copy"
    assert cli("data", "check", table, "--fix", copy).code == 0
    assert [shown(copy / "a.jsonl", "--line", line)[1] for line in (1, 2)] == [
        shown(table, "--line", line)[1] for line in (2, 3)
    ]


NULLS = dict.fromkeys(("tool_calls", "tool_call_id", "name", "weight", "response_format"))


def test_null_keys_and_empty_lists_are_absent(write, shown):
    turns = [{"role": "system", "content": "Use tools."}, ASK, CALLS, {"role": "tool", "content": "-3"}, COLD]
    padded = [{**NULLS, **turn} for turn in turns]
    padded[1]["tool_calls"] = padded[4]["tool_calls"] = padded[0]["tools"] = []
    plain = shown(write({"messages": turns}, name="a.jsonl"))
    assert shown(write({"prompt": None, "messages": padded, "tools": None, "text": None}, name="b.jsonl")) == plain
    assert shown(write({"text": None, "messages": None, "conversation": padded}, name="c.jsonl")) == plain


def test_null_keys_of_sharegpt_are_absent(write, shown):
    turns = [{"from": "human", "value": "hi", "weight": None}, {"from": "gpt", "value": "ho", "tool_calls": None}]
    record = {"conversations": turns, "system": None, "tools": []}
    assert shown(write(record))[1] == ["ho<turn_end>"]


def test_tools_of_instructions_are_read_and_functions_refused(write, shown, cli):
    tool = {"type": "function", "function": {"name": "weather"}}
    text, _ = shown(write({"instruction": "Weather?", "output": "Cold.", "tools": [tool]}))
    assert f"system tools: {json.dumps(tool)}" in text.replace("<n>", "\n")
    ran = cli("data", "check", write({"messages": [USER, RIGHT], "functions": [tool["function"]]}), "--json")
    (problem,) = json.loads(ran.out)["problems"]
    assert problem["kind"] == "unknown-key"
    assert "'functions' would have no effect (expected 'tools')" in problem["message"]


def test_an_example_of_another_weight_is_the_same_for_held_out_data(write, cli):
    path = write({"messages": [USER, ANSWER, AGAIN, RIGHT]})
    write({"messages": [USER, {**ANSWER, "weight": 0}, AGAIN, RIGHT]}, name="test.jsonl")
    ran = cli("data", "check", path.parent, "--json")
    assert json.loads(ran.out)["counts"] == {"overlap": 1}


def test_a_greeting_may_come_first(write, shown, cli):
    greeting = {"role": "assistant", "content": "Hello. What can I do?"}
    for before in ([], [{"role": "system", "content": "Be kind."}]):
        path = write({"messages": [*before, greeting, USER, RIGHT]})
        assert shown(path)[1] == ["Hello. What can I do?<turn_end>", "No: Paris.<turn_end>"]
        assert cli("data", "check", path, "--json").json["ok"]


def test_python_takes_the_same_messages(model_folder):
    model, tokenizer = mlx_afm.load(model_folder)
    tool = {"role": "tool", "content": PARTS}
    answers = {
        mlx_afm.generate(model, tokenizer, messages, max_tokens=8)
        for messages in (
            [ASK, CALLS, {**tool, "content": "-3 C\n-3 C"}],
            [{**ASK, "name": None}, {**CALLS, "content": None}, tool, tool],
        )
    }
    assert len(answers) == 1
