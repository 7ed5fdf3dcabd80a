"""`mlx-afm generate` with a draft model, and with a schema."""

import json
import re

import pytest

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
SCHEMA = {
    "type": "object",
    "title": "Count",
    "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 99}, "even": {"type": "boolean"}},
    "required": ["number", "even"],
    "additionalProperties": False,
}


@pytest.fixture
def schema(tmp_path):
    """A function that writes what the model is to follow."""

    def write(value, name="count.json"):
        (tmp_path / name).write_text(json.dumps(value))
        return tmp_path / name

    return write


def test_a_draft_model_changes_no_answer_and_is_counted(model_folder, say):
    plain = say(tokens=20)
    for number in ("2", "auto"):
        told = say("--draft-model", model_folder, "--num-draft-tokens", number, tokens=20)
        counts = told.pop("speculation")
        assert told == plain
        assert counts["acceptance_rate"] == counts["accepted_tokens"] / counts["draft_tokens"] > 0.5
        assert counts["tokens_per_round"] == 1 + counts["accepted_tokens"] / counts["rounds"]


def test_the_rate_is_told_on_stderr(model_folder, cli):
    options = ["--draft-model", model_folder, "--num-draft-tokens", 1, "--verbose", "true"]
    ran = cli("generate", "--model", model_folder, "-p", "sort vido.conf in reverse", "-m", 9, *options)
    line = r"draft: 100% accepted, 2\.00 tokens a round, [\d.]+ times as fast as without\n"
    assert re.search(line, ran.err)


def test_answers_by_a_schema(model_folder, say, schema):
    answers = set()
    for seed in range(3):
        told = say("--response-format", schema(SCHEMA), "--temp", 1.5, "--seed", seed, tokens=60)
        jsonschema.validate(json.loads(told["text"]), SCHEMA)
        assert (told["complete"], told["finish_reason"]) == (True, "stop")
        answers.add(told["text"])
    assert len(answers) > 1


def test_the_model_reads_the_schema_too(say, schema):
    plain = say(tokens=1)["prompt_tokens"]
    assert say("--response-format", schema(SCHEMA), tokens=1)["prompt_tokens"] > plain + 50
    assert say("--response-format", schema({"type": "json_object"}), tokens=1)["prompt_tokens"] == plain


def test_other_forms(say, schema):
    wrapped = {"type": "json_schema", "json_schema": {"name": "Count", "description": None, "schema": SCHEMA}}
    told = say("--response-format", schema(wrapped), tokens=60)
    jsonschema.validate(json.loads(told["text"]), SCHEMA)
    told = say("--response-format", schema({"type": "regex", "pattern": "[ab]{3}"}), "--temp", 2, tokens=60)
    assert re.fullmatch("[ab]{3}", told["text"])
    untitled = {key: value for key, value in SCHEMA.items() if key != "title"}
    assert json.loads(say("--response-format", schema(untitled), tokens=60)["text"]).keys() == {"number", "even"}


def test_with_a_draft_model_the_answer_follows_the_schema_as_well(model_folder, say, schema):
    path = schema(SCHEMA)
    alone = say("--response-format", path, tokens=60)
    told = say("--response-format", path, "--draft-model", model_folder, tokens=60)
    assert told["text"] == alone["text"]
    assert told["speculation"]["accepted_tokens"] > 0


def test_a_cut_answer_is_told(model_folder, cli, schema):
    options = ["--response-format", schema(SCHEMA), "-m", 3, "--json"]
    ran = cli("generate", "--model", model_folder, "-p", "count", *options)
    assert (ran.json["complete"], ran.json["finish_reason"]) == (False, "length")
    assert ran.err.startswith("the answer was cut before it was what the response format asks for")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([1], "count.json: not a response format (expected a JSON schema of an object, or a response format"),
        ({"type": "array"}, "the schema is not an object's"),
        ({"type": "regex"}, "a regex without pattern"),
        ({**SCHEMA, "not": {}}, "an answer cannot be held to this schema"),
        ({"type": "json_schema", "json_schema": {}}, "a response format without schema"),
    ],
    ids=["list", "array", "regex", "not", "empty"],
)
def test_what_is_no_response_format(model_folder, expect_refusal, schema, value, says):
    path = schema(value)
    expect_refusal("generate", "--model", model_folder, "-p", "count", "--response-format", path, says=[says])


def test_files_that_are_none(model_folder, expect_refusal, tmp_path):
    arguments = ["generate", "--model", model_folder, "-p", "count"]
    expect_refusal(*arguments, "--response-format", tmp_path / "gone.json", says=["gone.json: no such file"])
    expect_refusal(*arguments, "--draft-model", tmp_path / "gone", says=["gone"])


def test_a_draft_model_changes_no_answer_of_a_file(model_folder, cli, tmp_path):
    texts = ["sort vido.conf in reverse", "list the files in docs", "copy vome.go to zasu.txt"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    arguments = ["generate", "--model", model_folder, "-p", tmp_path / "p.jsonl", "-m", 20, "--json"]
    assert cli(*arguments, "--output", tmp_path / "plain.jsonl").code == 0
    for number in ("3", "auto"):
        output = tmp_path / f"{number}.jsonl"
        ran = cli(*arguments, "--output", output, "--draft-model", model_folder, "--num-draft-tokens", number)
        assert output.read_text() == (tmp_path / "plain.jsonl").read_text()
        counts = json.loads(ran.out)["speculation"]
        assert counts["acceptance_rate"] > 0.5
        assert counts["tokens_per_round"] > 1.5


def test_a_file_of_answers_by_a_schema(model_folder, cli, say, schema, tmp_path):
    """Each in its batch is what it is alone."""
    texts = ["count", "how many lines are in data.csv", "is it even"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    output = tmp_path / "a.jsonl"
    arguments = ["generate", "--model", model_folder, "-p", tmp_path / "p.jsonl", "--output", output]
    guided = [*arguments, "--response-format", schema(SCHEMA), "-m", 60]
    assert cli(*guided).code == 0
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    for number, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        jsonschema.validate(json.loads(answer["answer"]), SCHEMA)
        alone = say("--response-format", schema(SCHEMA), "--seed", number, tokens=60, prompt=text)
        assert (answer["answer"], answer["prompt_tokens"]) == (alone["text"], alone["prompt_tokens"])
    assert cli(*guided).code == 0
    other = [*arguments, "--response-format", schema({"type": "json_object"}, "other.json"), "-m", 60]
    for again in (other, [*arguments, "-m", 60]):
        ran = cli(*again)
        assert ran.code == 1
        assert "answers of another run" in ran.err


def test_what_no_answer_can_be_held_to_is_said_before_a_file_is_begun(model_folder, expect_refusal, schema, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    arguments = ["generate", "--model", model_folder, "-p", tmp_path / "p.jsonl", "--output", tmp_path / "a.jsonl"]
    says = ["an answer cannot be held to this schema"]
    expect_refusal(*arguments, "--response-format", schema({**SCHEMA, "not": {}}), says=says)
    assert not list(tmp_path.glob("a.jsonl*"))
