"""Files of prompts to files of answers, killed at any moment."""

from __future__ import annotations

import json

import pytest

import mlx_afm
from mlx_afm.errors import ConfigError, DataError, FormatError
from mlx_afm.generation import GenerateConfig
from mlx_afm.generation import jsonl as jsonl_module
from mlx_afm.workflows.answer import AnswerJob, answer_file
from mlx_afm.workflows.demo import ASSETS

SHORT = GenerateConfig(max_tokens=16)


@pytest.fixture
def prompts(tmp_path):
    """Six conversations of the demo's data: the last message of each is an answer, which is not to be seen."""
    lines = (ASSETS / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def answers_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def job_for(model_folder, prompts, **more):
    settings = {
        "model": model_folder,
        "prompts": prompts,
        "output": prompts.with_name("answers.jsonl"),
        "config": SHORT,
    }
    return AnswerJob(**{**settings, **more})


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


def test_a_killed_run_goes_on_where_it_was(model_folder, prompts, monkeypatch):
    """Killed after each number of answers in turn, in the middle of a line."""
    job = job_for(model_folder, prompts, config=GenerateConfig(max_tokens=16, temp=2, seed=3))
    whole = answer_file(job)
    expected, part = job.output.read_bytes(), job.output.with_name("answers.jsonl.part")
    assert whole.new == 6
    lines = [json.loads(line) for line in expected.splitlines()]
    assert [line["answer"] for line in lines] == expected_of(model_folder, prompts, temp=2, seed=3)

    class Killed(BaseException):
        pass

    def kill(state):
        if state.new == 2:
            raise Killed

    job.output.unlink()
    for left in (4, 2):
        with pytest.raises(Killed):
            answer_file(job, kill)
        assert not job.output.exists()
        assert len(answers_in(part)) == 6 - left
        with part.open("ab") as handle:
            handle.write(b'{"line": 6, "answer": "ha')
    assert answer_file(job).new == 2
    assert job.output.read_bytes() == expected
    assert not part.exists()


def test_prompts_added_later_are_answered_alone(model_folder, prompts):
    lines = prompts.read_text(encoding="utf-8").splitlines()
    job = job_for(model_folder, prompts)
    prompts.write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")
    assert answer_file(job).new == 4
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert answer_file(job).new == 2
    assert [answer["answer"] for answer in answers_in(job.output)] == expected_of(model_folder, prompts)


@pytest.mark.parametrize("change", ["settings", "prompts", "adapter"])
def test_answers_of_another_run_are_refused_and_stay(model_folder, prompts, adapter_forms, change):
    job = job_for(model_folder, prompts)
    answer_file(job)
    before, more = job.output.read_bytes(), {}
    if change == "settings":
        more = {"config": GenerateConfig(max_tokens=15)}
    elif change == "adapter":
        more = {"adapter_path": adapter_forms["folder"]}
    else:
        lines = prompts.read_text(encoding="utf-8").splitlines()
        prompts.write_text("\n".join(reversed(lines)) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"answers of another run.*\n.*has line 1"):
        answer_file(job_for(model_folder, prompts, **more))
    assert job.output.read_bytes() == before


def test_settings_that_change_no_answer_do_not_matter(model_folder, prompts):
    job = job_for(model_folder, prompts)
    answer_file(job)
    before = job.output.read_bytes()
    small = GenerateConfig(max_tokens=16, kv_bits=8, prefill_step_size=5)
    assert answer_file(job_for(model_folder, prompts, config=small)).new == 0
    job.output.unlink()
    assert answer_file(job_for(model_folder, prompts, config=small)).new == 6
    assert job.output.read_bytes() == before


def test_every_data_format_asks_the_same(model_folder, prompts):
    text = "sort vido.conf in reverse"
    messages = [{"role": "user", "content": text}]
    answered = [*messages, {"role": "assistant", "content": "no"}]
    forms = [
        messages,
        answered,
        {"messages": messages},
        {"prompt": text},
        {"prompt": messages, "completion": "no"},
        {"instruction": text, "output": ""},
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "no"}]},
    ]
    prompts.write_text("\n".join(map(json.dumps, forms)) + "\n", encoding="utf-8")
    job = job_for(model_folder, prompts)
    answer_file(job)
    found = {answer["answer"] for answer in answers_in(job.output)}
    assert found == {mlx_afm.generate(*mlx_afm.load(model_folder), text, max_tokens=16)}
    job = job_for(model_folder, prompts, output=job.output.with_name("others.jsonl"), system="Answer briefly.")
    answer_file(job)
    system = [{"role": "system", "content": "Answer briefly."}, *messages]
    found = {(answer["answer"], answer["prompt_tokens"]) for answer in answers_in(job.output)}
    tokenizer = mlx_afm.load(model_folder)[1]
    expected = mlx_afm.generate(*mlx_afm.load(model_folder), system, max_tokens=16)
    assert found == {(expected, len(mlx_afm.generation.to_prompt_ids(tokenizer, system)))}


def test_outputs_that_cannot_be_are_refused(model_folder, prompts, tmp_path):
    with pytest.raises(ConfigError, match="take the place of the prompts"):
        job_for(model_folder, prompts, output=prompts)
    with pytest.raises(ConfigError, match="a folder is in the place"):
        job_for(model_folder, prompts, output=tmp_path)
    with pytest.raises(ConfigError, match="batch_size"):
        job_for(model_folder, prompts, batch_size=0)
    for text in ("what is this\n", "[]\n", '{"line": "1"}\n'):
        output = tmp_path / "foreign.jsonl"
        output.write_text(text)
        with pytest.raises(FormatError, match=r"foreign.jsonl line 1: not a file of answers"):
            answer_file(job_for(model_folder, prompts, output=output))
        assert output.read_text() == text


def test_a_digest_tells_prompts_and_settings_apart():
    request = jsonl_module.Request(ids=[1, 2], config=SHORT)
    others = [
        jsonl_module.Request(ids=[1, 3], config=SHORT),
        *(
            jsonl_module.Request(ids=[1, 2], config=GenerateConfig(**{"max_tokens": 16, name: value}))
            for name, value in {"temp": 1, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 1, "stop": ("x",)}.items()
        ),
    ]
    runs = [jsonl_module.run_of(each, "model") for each in (request, *others)] + [jsonl_module.run_of(request, "other")]
    assert len(set(runs)) == len(runs)


def test_a_record_of_the_wrong_kind_is_named(tmp_path, model_folder):
    tokenizer = mlx_afm.load(model_folder)[1]
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xff{"messages": []}\n')
    with pytest.raises(DataError, match="line 1"):
        jsonl_module.read_prompt_rows(path, tokenizer, SHORT)
