"""Files of prompts, chat and single answers run compiled steps where these are on, and say the same as without."""

from __future__ import annotations

import json

import pytest

import mlx_afm
from mlx_afm.generation import GenerateConfig, generate
from mlx_afm.generation.chat import Chat
from mlx_afm.generation.decode import PLAIN_STEPS, SWITCH
from mlx_afm.generation.forms import decoder_of
from mlx_afm.generation.speculation import Speculation
from mlx_afm.workflows import answer
from tiny import tiny_model

TEXTS = [f"copy {name}.go to {name}.txt" for name in ("vome", "zasu", "mova", "vido", "nali", "tepo")] * 2
SAMPLED = {"temp": 3.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def loaded(model_folder):
    return mlx_afm.load(model_folder)


@pytest.fixture
def compiled(model_folder, monkeypatch):
    """A model whose steps are compiled, and what its decoder ran."""
    monkeypatch.setenv(SWITCH, "1")
    model, tokenizer = mlx_afm.load(model_folder)
    return model, tokenizer, decoder_of(model).decoder.counters


def file_of(tmp_path, name):
    path = tmp_path / name
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return path


@pytest.mark.parametrize("drafted", [False, True])
def test_a_file_of_prompts(loaded, compiled, tmp_path, monkeypatch, drafted):
    model, tokenizer, counters = compiled
    answers = []
    for pair in (loaded, (model, tokenizer)):
        monkeypatch.setattr(answer, "load_for_answers", lambda *_, pair=pair: pair)
        options = {"prompts": file_of(tmp_path, "p.jsonl"), "output": tmp_path / f"{len(answers)}.jsonl"}
        if drafted:
            draft = tiny_model(vocab_size=512, num_layers=1, num_kv_reuse_layers=0)
            monkeypatch.setattr(answer, "load_draft", lambda *_, draft=draft: Speculation(draft=draft))
            options["draft_model"] = tmp_path
        job = answer.AnswerJob(model="m", config=GenerateConfig(max_tokens=12), batch_size=4, **options)
        assert answer.answer_file(job).new == len(TEXTS)
        answers.append([json.loads(line)["answer"] for line in job.output.read_text().splitlines()])
    assert answers[0] == answers[1]
    assert counters.plain_steps == PLAIN_STEPS
    assert counters.compiled_steps > 0


def test_a_chat(loaded, compiled):
    model, tokenizer, counters = compiled
    chats = [Chat(model=pair[0], tokenizer=tokenizer, config=GenerateConfig(**SAMPLED)) for pair in (loaded, (model,))]
    for question in TEXTS[:3]:
        before = counters.plain_steps
        said = ["".join(response.text for response in chat.ask(question)) for chat in chats]
        assert said[0] == said[1]
        steps = chats[1].last.generation_tokens
        assert counters.plain_steps - before == min(PLAIN_STEPS, steps - (steps == 24))
    assert counters.compiled_steps > 0


def test_one_answer_short_and_long(loaded, compiled):
    model, tokenizer, counters = compiled
    generate(model, tokenizer, TEXTS[0], max_tokens=8)
    assert (counters.compiled_steps, counters.traces) == (0, 0)  # a short answer never waits for a compiler
    for number in range(3):
        config = GenerateConfig(**SAMPLED, seed=number)
        assert generate(model, tokenizer, TEXTS[0], config) == generate(*loaded, TEXTS[0], config)
    assert counters.compiled_steps > 0
    assert counters.traces == 1
