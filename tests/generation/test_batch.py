"""Rows of a batch against the same prompts one by one, and shared beginnings against none."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from engine_runs import answer, answers, engine_of, events_of

import mlx_afm
from mlx_afm.errors import ConfigError
from mlx_afm.generation import GenerateConfig, PrefixCache, Request, batch_generate, iter_answers
from tiny import tiny_model

GREEDY = GenerateConfig(max_tokens=12)
SAMPLED = GenerateConfig(max_tokens=12, temp=1.2, top_p=0.95, top_k=40, min_p=0.01)
LENGTHS = (3, 17, 1, 40, 8, 25, 2, 33, 12, 5, 21, 9, 38, 4, 29, 14)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def loaded(model_folder):
    return mlx_afm.load(model_folder)


def prompts(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 61, length).tolist() for length in LENGTHS]


def together(model, requests, batch_size=16, **options):
    return answers(engine_of(model, batch_size=batch_size, **options), requests)


@pytest.mark.parametrize(
    ("config", "batch_size", "kv_bits"),
    [(GREEDY, 16, None), (SAMPLED, 16, 8), (SAMPLED, 5, None), (GREEDY, 5, 8)],
    ids=["greedy", "sampled int8", "sampled in turns", "greedy int8 in turns"],
)
def test_sixteen_unequal_prompts_are_sixteen_single_runs(model, config, batch_size, kv_bits):
    settings = {**vars(config), "kv_bits": kv_bits}
    requests = [
        Request(ids=ids, config=GenerateConfig(**{**settings, "seed": number, "max_tokens": 12 - number % 5}))
        for number, ids in enumerate(prompts())
    ]
    expected = [answer(model, request.ids, request.config) for request in requests]
    assert together(model, requests, batch_size) == expected
    assert len({tuple(tokens) for tokens in expected}) > 8


def test_rows_with_different_settings_share_a_batch(model):
    configs = [GREEDY, SAMPLED, GenerateConfig(max_tokens=6, temp=0.8, seed=4), GREEDY]
    requests = [Request(ids=ids, config=config) for ids, config in zip(prompts(), configs)]
    assert together(model, requests) == [answer(model, request.ids, request.config) for request in requests]


def test_processors_see_their_own_row(model):
    def ban(token):
        def process(history, logits):
            assert logits.shape == (1, 61)
            seen.append(history.shape[0])
            return mx.where(mx.arange(61) == token, -mx.inf, logits)

        return process

    first = [answer(model, ids, GREEDY) for ids in prompts()[:3]]
    seen: list[int] = []
    requests = [
        Request(ids=ids, config=GREEDY, logits_processors=[ban(tokens[0])] if row != 1 else ())
        for row, (ids, tokens) in enumerate(zip(prompts(), first))
    ]
    found = together(model, requests)
    assert found[1] == first[1]
    assert all(first[row][0] not in found[row] for row in (0, 2))
    assert found[0] == answer(model, requests[0].ids, GREEDY, logits_processors=requests[0].logits_processors)
    assert set(range(3, 3 + 12)) | set(range(1, 1 + 12)) <= set(seen)


def test_rows_that_are_removed_leave_the_others_alone(model):
    engine = engine_of(model, batch_size=3)
    rows = [engine.add(Request(ids=ids, config=GREEDY))[0] for ids in prompts()[:5]]
    for turn in range(40):
        engine.step()
        if turn == 3:
            engine.remove([rows[1], rows[4]])
            engine.remove([rows[1]])
    expected = [answer(model, ids, GREEDY) for ids in prompts()[:5]]
    assert [rows[row].tokens for row in (0, 2, 3)] == [expected[row] for row in (0, 2, 3)]
    assert (rows[1].tokens, rows[4].tokens) == (expected[1][:4], [])
    assert not engine.busy


def test_an_end_token_ends_its_row_alone(model):
    expected = [answer(model, ids, GREEDY) for ids in prompts()]
    end = expected[3][4]
    requests = [Request(ids=ids, config=GREEDY, stop_token_ids=frozenset({end})) for ids in prompts()]
    events = events_of(engine_of(model), requests)
    reasons = {tuple(event.row.request.ids): event.finish_reason for event in events}
    found = {tuple(event.row.request.ids): event.row.tokens for event in events}
    for ids, tokens in zip(map(tuple, prompts()), expected):
        cut = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        assert (found[ids], reasons[ids]) == (cut, "stop" if end in tokens else "length")


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_common_beginning_is_computed_once_and_changes_nothing(model, kv_bits, monkeypatch):
    config = GenerateConfig(max_tokens=6, kv_bits=kv_bits)
    common = np.random.default_rng(5).integers(1, 61, 30).tolist()
    requests = [Request(ids=common + ids, config=config) for ids in prompts()[:6]]
    expected = [answer(model, request.ids, config) for request in requests]
    computed = []
    hidden = type(model).hidden
    monkeypatch.setattr(
        type(model),
        "hidden",
        lambda self, tokens, **more: computed.append(tokens.shape) or hidden(self, tokens, **more),
    )
    assert together(model, requests, prefix_cache=PrefixCache()) == expected
    assert sum(length for _, length in computed if length > 1) <= 30 + sum(LENGTHS[:6])


def test_answers_come_in_order_with_text_and_reasons(loaded):
    model, tokenizer = loaded
    texts = ["copy vome.go to zasu.txt", "sort vido.conf in reverse", "list the files in docs"] * 2
    answers = batch_generate(model, tokenizer, texts, max_tokens=24, batch_size=4)
    assert [answer.text for answer in answers] == [
        mlx_afm.generate(model, tokenizer, text, max_tokens=24) for text in texts
    ]
    assert all(answer.finish_reason == "stop" for answer in answers)
    assert all(answer.tokens[-1] == tokenizer.turn_end_id for answer in answers)
    sampled = batch_generate(model, tokenizer, texts, max_tokens=24, temp=3, seed=7)
    assert [answer.text for answer in sampled] == [
        mlx_afm.generate(model, tokenizer, text, max_tokens=24, temp=3, seed=7 + row) for row, text in enumerate(texts)
    ]


def test_stop_texts_end_rows_of_a_batch(loaded):
    model, tokenizer = loaded
    texts = ["copy vome.go to zasu.txt", "sort vido.conf in reverse"]
    whole = [mlx_afm.generate(model, tokenizer, text, max_tokens=24) for text in texts]
    stop = whole[0][2:4]
    answers = batch_generate(model, tokenizer, texts, max_tokens=24, stop=(stop,))
    assert [answer.text for answer in answers] == [text.partition(stop)[0] for text in whole]
    assert answers[0].finish_reason == "stop"


def test_what_cannot_be_answered_is_refused_before_anything_is_computed(loaded):
    model, tokenizer = loaded
    small = GenerateConfig(context_tokens=20)
    with pytest.raises(ConfigError, match=r"no room for an answer .*expected at most 19 tokens, found 30 tokens"):
        next(iter_answers(model, tokenizer, [Request(ids=[3] * 5), Request(ids=[3] * 30, config=small)]))
    engine = engine_of(model)
    with pytest.raises(ConfigError, match="empty prompt"):
        engine.add(Request(ids=[]))
    with pytest.raises(ConfigError, match="top_k is too large"):
        engine.add(Request(ids=[1], config=GenerateConfig(top_k=512)))
    engine.add(Request(ids=[1]))
    with pytest.raises(ConfigError, match="differ in kv_bits"):
        engine.add(Request(ids=[1], config=GenerateConfig(kv_bits=8)))
    with pytest.raises(ConfigError, match="batch_size"):
        engine_of(model, batch_size=0)


def test_the_end_of_the_context_ends_the_answer(model):
    config = GenerateConfig(context_tokens=20, max_tokens=50)
    engine = engine_of(model)
    events = events_of(engine, [Request(ids=[5] * 17, config=config), Request(ids=[5] * 2, config=config)])
    counts = {len(event.row.request.ids): len(event.row.tokens) for event in events}
    assert counts == {17: 3, 2: 18}
    assert {len(event.row.request.ids): event.finish_reason for event in events} == {17: "length", 2: "length"}
