"""`generate` with files: of prompts and answers, and of a prompt's keys and values."""

from __future__ import annotations

import json

import pytest

import mlx_afm
from mlx_afm.workflows.demo import ASSETS


@pytest.fixture
def prompts(tmp_path):
    """Six conversations of the demo's data: the last message of each is an answer, which is not to be seen."""
    lines = (ASSETS / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def answers_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected_of(model_folder, prompts, **settings):
    model, tokenizer = mlx_afm.load(model_folder)
    found = []
    for number, line in enumerate(prompts.read_text(encoding="utf-8").splitlines()):
        *messages, last = json.loads(line)
        assert last["role"] == "assistant"
        options = {"max_tokens": 16, **settings}
        options["seed"] = options.get("seed", 0) + number
        found.append(mlx_afm.generate(model, tokenizer, messages, **options))
    return found


def test_the_command_answers_a_file_in_order(cli, model_folder, prompts):
    output = prompts.with_name("answers.jsonl")
    line = ("generate", "--model", model_folder, "--prompt", prompts, "--output", output, "-m", 16, "--batch-size", 4)
    ran = cli(*line, "--json")
    assert ran.json["answers"] == ran.json["new"] == 6
    assert "6/6 answers" in ran.err
    found = answers_in(output)
    assert [answer["answer"] for answer in found] == expected_of(model_folder, prompts)
    assert [answer["line"] for answer in found] == [1, 2, 3, 4, 5, 6]
    assert {answer["finish_reason"] for answer in found} == {"stop"}
    assert ran.json["generation_tokens"] == sum(answer["generation_tokens"] for answer in found)
    assert not output.with_name("answers.jsonl.part").exists()
    before = output.read_bytes()
    assert cli(*line, "--json").json["new"] == 0
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("record", "options"),
    [
        ({"prompt": "list the files in docs"}, []),
        ({"question": "list the files in docs"}, ["--field", "prompt=question"]),
        ({"question": "list the files in docs"}, ["--field", "prompt=question", "--data-format", "prompt-completion"]),
        ({"q": "list the files in docs", "a": "no"}, ["--field", "prompt=q", "--field", "completion=a"]),
        ({"q": "list the files in docs"}, ["--field", "prompt=q", "--field", "completion=a"]),
        ({"instruction": "list the files in docs"}, []),
        ({"task": "list the files in docs"}, ["--field", "instruction=task"]),
    ],
    ids=str,
)
def test_columns_of_prompts_that_have_other_names(record, options, cli, model_folder, say, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps(record) + "\n")
    output = tmp_path / "a.jsonl"
    ran = cli(
        "generate", "--model", model_folder, "--prompt", tmp_path / "q.jsonl", "--output", output, "-m", 8, *options
    )
    assert ran.code == 0, ran.err
    assert answers_in(output)[0]["answer"] == say(prompt="list the files in docs")["text"]


def test_lines_that_are_no_prompts_are_refused_together(cli, model_folder, prompts, expect_refusal):
    lines = [
        '{"messages": [{"role": "user", "content": "hello"}]}',
        "{",
        '{"text": "plain"}',
        '[{"role": "assistant", "content": "a"}]',
        '{"other": 1}',
        '[{"role": "user", "content": "a<turn_end>b"}]',
        json.dumps([{"role": "user", "content": "word " * 5000}]),
        '"text"',
        '{"messages": "none"}',
    ]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    output = prompts.with_name("answers.jsonl")
    message = expect_refusal(
        "generate", "--model", model_folder, "--prompt", prompts, "--output", output,
        says=["lines that are no prompts", "line 2: not JSON", "line 3: plain text asks for no answer",
              "line 4: nothing to answer", "line 5: no messages", "line 6", "special token '<turn_end>'",
              "line 7: the prompt leaves no room", "expected at most 4095 tokens", "line 8: not a record",
              "line 9: no messages"],
    )  # fmt: skip
    assert "line 1:" not in message
    prompts.write_text("\n", encoding="utf-8")
    expect_refusal("generate", "--model", model_folder, "--prompt", prompts, "--output", output, says=["no prompts"])
    expect_refusal(
        "generate", "--model", model_folder, "--prompt", prompts.with_name("no.jsonl"), "--output", output,
        says=["no.jsonl: no such file"],
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", "a.jsonl"],
        ["--prompt", "hello", "--output", "b.jsonl"],
        ["--prompt", "a.jsonl", "--output", "b.jsonl", "--prompt-cache-file", "c.safetensors"],
        ["--prompt", "a.jsonl", "--output", "b.jsonl", "--transform", "a:b"],
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together(arguments, cli, model_folder):
    assert cli("generate", "--model", model_folder, *arguments).code == 2


def test_a_text_that_ends_like_a_file_is_a_text(say):
    assert say(prompt="list the files in data.jsonl")["text"]


def test_a_prompt_cache_is_written_once_and_used_after(cli, model_folder, say, tmp_path, adapter_forms, expect_refusal):
    file = tmp_path / "kept.safetensors"
    system = ("--system-prompt", "Answer with one shell command. " * 5)
    plain = say(*system)
    assert say(*system, "--prompt-cache-file", file) == plain
    before = file.read_bytes()
    assert say(*system, "--prompt-cache-file", file) == plain
    other = say(*system, prompt="list the files in docs")
    assert say(*system, "--prompt-cache-file", file, prompt="list the files in docs") == other
    assert file.read_bytes() == before
    line = ["generate", "--model", model_folder, "--prompt", "hello", "--prompt-cache-file"]
    advice = "It is of use with the model and adapter it was made with alone"
    expect_refusal(
        *line, file, "--adapter-path", adapter_forms["folder"], says=["cache of another model or adapter", file, advice]
    )
    expect_refusal(*line, file, "--kv-bits", 8, says=["cache of the other kind", file])
    expect_refusal(*line, tmp_path / "kept.bin", says=["the name of a prompt cache", "expected .safetensors"], code=2)
    file.write_bytes(before[: len(before) // 2])
    expect_refusal(*line, file, says=[file])


def test_stop_texts_and_small_pieces_of_a_prompt(say):
    whole = say(tokens=40)
    stop = whole["text"][3:5]
    cut = say("--stop", "never said", "--stop", stop, tokens=40)
    assert cut["text"] == whole["text"].partition(stop)[0]
    assert cut["finish_reason"] == "stop"
    assert cut["generation_tokens"] < whole["generation_tokens"]
    assert say("--prefill-step-size", 3, tokens=40) == whole


def test_a_prompt_that_fills_the_context_is_refused_before_it_is_computed(model_folder, expect_refusal):
    says = ["no room for an answer", "expected at most 4095 tokens"]
    expect_refusal("generate", "--model", model_folder, "--prompt", "word " * 6000, says=says)
