"""A chat answers as if the conversation were a prompt of its own each time, but reads only what is new."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from text.sentencepiece_models import model_bytes, toy_pieces

import mlx_afm
from mlx_afm.errors import ConfigError, DataError
from mlx_afm.generation import GenerateConfig, generate, sampling, to_prompt_ids
from mlx_afm.generation.chat import Chat
from mlx_afm.generation.speculation import Speculation
from mlx_afm.model.row_cache import RowKVCache
from mlx_afm.text.tokenizer import AFMTokenizer
from tiny import tiny_model

QUESTIONS = ["sort vido.conf in reverse", "how much space does test-87 take", "and mova.ini?", "thanks"]


@pytest.fixture(scope="module")
def loaded(model_folder):
    return mlx_afm.load(model_folder)


def new_chat(loaded, **options):
    options.setdefault("config", GenerateConfig(max_tokens=12))
    return Chat(model=loaded[0], tokenizer=loaded[1], **options)


def say(chat, text, **options):
    return "".join(response.text for response in chat.ask(text, **options))


class Watched:
    """Counts the tokens that a model computes."""

    def __init__(self, model, monkeypatch):
        self.tokens, call = 0, type(model.model).__call__

        def counted(inner, tokens_BL, *rest):
            self.tokens += tokens_BL.shape[1]
            return call(inner, tokens_BL, *rest)

        monkeypatch.setattr(type(model.model), "__call__", counted)

    def __call__(self):
        count, self.tokens = self.tokens, 0
        return count


@pytest.mark.parametrize(
    ("config", "drafted"),
    [
        (GenerateConfig(max_tokens=12), False),
        (GenerateConfig(max_tokens=12, temp=1.3, seed=4), False),
        (GenerateConfig(max_tokens=12, kv_bits=8), False),
        (GenerateConfig(max_tokens=12), True),
    ],
    ids=["greedy", "sampled", "int8", "draft"],
)
def test_answers_are_those_of_the_whole_conversation(loaded, config, drafted):
    draft = tiny_model(vocab_size=512, num_layers=1, num_kv_reuse_layers=0) if drafted else None
    speculation = Speculation(draft=draft) if drafted else None
    chat = new_chat(loaded, config=config, system="Answer with one shell command.", speculation=speculation)
    asked = [{"role": "system", "content": "Answer with one shell command."}]
    for number, question in enumerate(QUESTIONS):
        asked.append({"role": "user", "content": question})
        alone = generate(*loaded, asked, replace(config, seed=config.seed + 2 * number))
        assert say(chat, question) == alone
        assert chat.last.prompt_tokens == len(to_prompt_ids(loaded[1], asked))
        asked.append({"role": "assistant", "content": alone})
        assert chat.conversation == asked
    assert speculation is None or speculation.drafted > 0


def test_only_what_is_new_is_read(loaded, monkeypatch):
    chat, read = new_chat(loaded), Watched(loaded[0], monkeypatch)
    say(chat, QUESTIONS[0])
    assert chat.last.reused_tokens == 0
    for question in QUESTIONS[1:]:
        before = chat.last
        read()
        say(chat, question)
        turn, alone = chat.last, len(to_prompt_ids(loaded[1], question))
        assert turn.reused_tokens >= before.prompt_tokens
        assert read() == turn.prompt_tokens - turn.reused_tokens + turn.generation_tokens - 1 + (
            turn.finish_reason == "stop"
        )
        assert turn.prompt_tokens - turn.reused_tokens < alone


def test_another_system_message_is_read_anew_and_no_more_is_known_than_is_alike(loaded):
    chat = new_chat(loaded)
    say(chat, QUESTIONS[0])
    chat.system = "Go."
    fresh = new_chat(loaded, system="Go.", messages=list(chat.messages), config=replace(chat.config, seed=0))
    assert say(chat, QUESTIONS[1]) == say(fresh, QUESTIONS[1])
    assert 0 < chat.last.reused_tokens < 6


def test_an_answer_that_was_stopped_is_kept_as_far_as_it_came(loaded):
    chat, seen = new_chat(loaded), []

    def enough():
        return len(seen) == 3

    for response in chat.ask(QUESTIONS[0], enough):
        seen.append(response.text)
    assert (chat.last.finish_reason, chat.last.kept, chat.last.generation_tokens) == ("stopped", True, 3)
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(seen)}
    fresh = new_chat(loaded, messages=list(chat.messages))
    assert say(chat, QUESTIONS[1]) == say(fresh, QUESTIONS[1])
    assert chat.last.reused_tokens > fresh.last.reused_tokens == 0


def test_leaving_the_iterator_stops_too(loaded):
    chat = new_chat(loaded)
    answer = chat.ask(QUESTIONS[0])
    first = next(answer).text
    answer.close()
    assert chat.messages[-1]["content"] == first
    assert chat.last.finish_reason == "stopped"


def test_stopping_while_the_prompt_is_read(loaded):
    chat = new_chat(loaded, config=GenerateConfig(max_tokens=12, prefill_step_size=4))
    calls = []
    assert list(chat.ask(QUESTIONS[0], lambda: len(calls) == 2 or calls.append(1))) == []
    assert (chat.last.finish_reason, chat.last.kept, chat.last.generation_tokens) == ("stopped", False, 0)
    assert chat.messages == []
    answer = say(chat, QUESTIONS[0])
    assert chat.last.reused_tokens == 12  # three pieces of four
    assert answer == say(new_chat(loaded), QUESTIONS[0])


def test_an_interruption_between_two_layers(loaded, monkeypatch):
    """Ctrl-C pressed twice: some layers have stored the token and others not."""
    chat, calls, update = new_chat(loaded), [], RowKVCache.update_and_fetch

    def interrupted(self, keys, values):
        calls.append(1)
        if len(calls) == 10:  # of four layers, in the third step
            raise KeyboardInterrupt
        return update(self, keys, values)

    with monkeypatch.context() as patch:
        patch.setattr(RowKVCache, "update_and_fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            say(chat, QUESTIONS[0])
    fresh = new_chat(loaded, messages=list(chat.messages))
    assert say(chat, QUESTIONS[1]) == say(fresh, QUESTIONS[1])
    assert chat.last.reused_tokens > 0


def test_a_full_context_is_said_and_nothing_is_dropped(loaded):
    chat = new_chat(loaded, config=GenerateConfig(max_tokens=30, context_tokens=48))
    say(chat, QUESTIONS[0])
    assert chat.last.finish_reason in ("context", "stop")
    before = [dict(message) for message in chat.messages]
    with pytest.raises(ConfigError, match="the conversation fills the model's context"):
        say(chat, QUESTIONS[1])
    assert chat.messages == before
    assert chat.last is None


def test_the_end_of_the_context_ends_the_answer(loaded):
    ids = to_prompt_ids(loaded[1], QUESTIONS[0])
    for more, reason in ((3, "context"), (12, "stop")):
        chat = new_chat(loaded, config=GenerateConfig(max_tokens=40, context_tokens=len(ids) + more))
        say(chat, QUESTIONS[0])
        assert chat.last.finish_reason == reason
    chat = new_chat(loaded, config=GenerateConfig(max_tokens=3))
    say(chat, QUESTIONS[0])
    assert chat.last.finish_reason == "length"


def test_a_text_that_spells_a_mark_is_refused(loaded):
    chat = new_chat(loaded)
    with pytest.raises(DataError, match="spells out the special token"):
        say(chat, "a<turn_end>")
    assert chat.messages == []


@pytest.mark.parametrize(
    ("said", "message", "cleaned"),
    [
        ("a\n b ", {"content": "a\n b "}, False),
        ("", {"content": ""}, False),
        (
            'ls<executable_start> ```function\n[{"name": "a"}]```<executable_end>',
            {"content": "ls", "tool_calls": [{"function": {"name": "a", "arguments": "{}"}}]},
            False,
        ),
        ("ls <executable_start> cut", {"content": "ls  cut"}, True),
        ("a <turn_start>b<executable_end>", {"content": "a b"}, True),
    ],
    ids=["text", "nothing", "tool call", "cut call", "marks"],
)
def test_what_an_answer_is_in_the_conversation(toy_tokenizer, monkeypatch, said, message, cleaned):
    """A sampler that says what it is told, place by place."""
    ids = [*toy_tokenizer.encode("\n" + said)[2:], toy_tokenizer.turn_end_id, 0]
    monkeypatch.setattr(
        sampling, "choose_tokens", lambda logits, configs, places: mx.array([ids[place] for place in places], mx.int32)
    )
    chat = Chat(model=tiny_model(vocab_size=512), tokenizer=toy_tokenizer, config=GenerateConfig(max_tokens=300))
    for question in ("one", "two"):
        assert say(chat, question) == said
        assert chat.messages[-1] == {"role": "assistant", **message}
        assert chat.last.cleaned == cleaned
    assert to_prompt_ids(toy_tokenizer, [*chat.conversation, {"role": "user", "content": "three"}])


@pytest.fixture
def toy_tokenizer(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_bytes(toy_pieces()))
    return AFMTokenizer.from_file(tmp_path / "tokenizer.model")
