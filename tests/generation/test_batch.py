"""Rows of a batch against the same prompts one by one, and shared beginnings against none."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlx_afm
from mlx_afm.errors import ConfigError
from mlx_afm.generation import BatchGenerator, GenerateConfig, PrefixCache, Request, batch_generate, iter_answers
from mlx_afm.generation.steps import iter_steps
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


def alone(model, ids, config, **options):
    cache = model.make_cache(quantized=config.kv_bits is not None)
    steps = iter_steps(model, ids, config, cache=cache, max_tokens=config.max_tokens, **options)
    return [step.token for step in steps]


def together(model, requests, batch_size=16, **options):
    rows = BatchGenerator(model, set(), batch_size=batch_size, **options)
    numbers = [rows.insert(request) for request in requests]
    found = {number: [] for number in numbers}
    while rows.busy:
        for step in rows.step():
            found[step.row].append(step.token)
    return [found[number] for number in numbers]


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
    expected = [alone(model, request.ids, request.config) for request in requests]
    assert together(model, requests, batch_size) == expected
    assert len({tuple(tokens) for tokens in expected}) > 8


def test_rows_with_different_settings_share_a_batch(model):
    configs = [GREEDY, SAMPLED, GenerateConfig(max_tokens=6, temp=0.8, seed=4), GREEDY]
    requests = [Request(ids=ids, config=config) for ids, config in zip(prompts(), configs)]
    assert together(model, requests) == [alone(model, request.ids, request.config) for request in requests]


def test_processors_see_their_own_row(model):
    def ban(token):
        def process(history, logits):
            assert logits.shape == (1, 61)
            seen.append(history.shape[0])
            return mx.where(mx.arange(61) == token, -mx.inf, logits)

        return process

    first = [alone(model, ids, GREEDY) for ids in prompts()[:3]]
    seen: list[int] = []
    requests = [
        Request(ids=ids, config=GREEDY, logits_processors=[ban(tokens[0])] if row != 1 else ())
        for row, (ids, tokens) in enumerate(zip(prompts(), first))
    ]
    found = together(model, requests)
    assert found[1] == first[1]
    assert all(first[row][0] not in found[row] for row in (0, 2))
    assert found[0] == alone(model, requests[0].ids, GREEDY, logits_processors=requests[0].logits_processors)
    assert set(range(3, 3 + 12)) | set(range(1, 1 + 12)) <= set(seen)


def test_rows_that_are_removed_leave_the_others_alone(model):
    rows = BatchGenerator(model, set(), batch_size=3)
    for ids in prompts()[:5]:
        rows.insert(Request(ids=ids, config=GREEDY))
    found = {number: [] for number in range(5)}
    for turn in range(40):
        for step in rows.step():
            found[step.row].append(step.token)
        if turn == 3:
            rows.remove(1)
            rows.remove(4)
            rows.remove(99)
    expected = [alone(model, ids, GREEDY) for ids in prompts()[:5]]
    assert [found[row] for row in (0, 2, 3)] == [expected[row] for row in (0, 2, 3)]
    assert (found[1], found[4]) == (expected[1][:4], [])
    assert not rows.busy


def test_an_end_token_ends_its_row_alone(model):
    expected = [alone(model, ids, GREEDY) for ids in prompts()]
    end = expected[3][4]
    rows = BatchGenerator(model, {end})
    for ids in prompts():
        rows.insert(Request(ids=ids, config=GREEDY))
    found, reasons = {row: [] for row in range(16)}, {}
    while rows.busy:
        for step in rows.step():
            found[step.row].append(step.token)
            reasons[step.row] = step.finish_reason
    for row, tokens in enumerate(expected):
        cut = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        assert (found[row], reasons[row]) == (cut, "stop" if end in tokens else "length")


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_common_beginning_is_computed_once_and_changes_nothing(model, kv_bits, monkeypatch):
    config = GenerateConfig(max_tokens=6, kv_bits=kv_bits)
    common = np.random.default_rng(5).integers(1, 61, 30).tolist()
    requests = [Request(ids=common + ids, config=config) for ids in prompts()[:6]]
    expected = [alone(model, request.ids, config) for request in requests]
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
    rows = BatchGenerator(model, set())
    with pytest.raises(ConfigError, match="empty prompt"):
        rows.insert(Request(ids=[]))
    with pytest.raises(ConfigError, match="top_k is too large"):
        rows.insert(Request(ids=[1], config=GenerateConfig(top_k=512)))
    rows.insert(Request(ids=[1]))
    with pytest.raises(ConfigError, match="differ in kv_bits"):
        rows.insert(Request(ids=[1], config=GenerateConfig(kv_bits=8)))
    with pytest.raises(ConfigError, match="batch_size"):
        BatchGenerator(model, set(), batch_size=0)


def test_the_end_of_the_context_ends_the_answer(model):
    config = GenerateConfig(context_tokens=20, max_tokens=50)
    rows = BatchGenerator(model, set())
    rows.insert(Request(ids=[5] * 17, config=config))
    rows.insert(Request(ids=[5] * 2, config=config))
    steps = []
    while rows.busy:
        steps += rows.step()
    assert [sum(step.row == row for step in steps) for row in (0, 1)] == [3, 18]
    assert {step.row: step.finish_reason for step in steps} == {0: "length", 1: "length"}
