"""Speculative decoding gives what the target alone gives: the same tokens greedily, for each row of a batch."""

from __future__ import annotations

import shutil

import mlx.core as mx
import pytest
from engine_runs import answer, answers, engine_of, events_of, spoiled

import mlx_afm
import tolerances
from mlx_afm.errors import ConfigError
from mlx_afm.generation import GenerateConfig, PrefixCache, Request, Sampler, speculative
from mlx_afm.generation.chat import Chat
from mlx_afm.generation.prefix_cache import prefix_owner
from mlx_afm.generation.speculation import Speculation, require_pair
from tiny import tiny_model

PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7]
OTHERS = [[5, 9, 33], [*PROMPT, 21, 4, 17], [50], [8] * 25]
DRAFT_SIZES = {"num_layers": 3, "num_kv_reuse_layers": 0, "kv_quant": False}


@pytest.fixture(scope="module")
def target():
    return tiny_model(seed=1)


@pytest.fixture(scope="module")
def draft():
    return tiny_model(seed=2, **DRAFT_SIZES)


def requests_of(prompts, count, **settings):
    return [Request(ids=ids, config=GenerateConfig(max_tokens=count, **settings)) for ids in prompts]


def events(model, speculation, count, **settings):
    return events_of(engine_of(model, speculation=speculation), requests_of([PROMPT], count, **settings))


def tokens_of(given):
    return [event.token.token for event in given]


def plain(model, count, prompt=PROMPT, **settings):
    return answer(model, prompt, GenerateConfig(max_tokens=count, **settings))


def rigged(model, right):
    """A draft that is right where `right` says so of the place in the answer."""
    return spoiled(model, lambda place: right(place - len(PROMPT)))


@pytest.mark.parametrize(("length", "count"), [(5, 1), (5, 2), (5, 7), (1, 20), (5, 50), (None, 50)])
def test_greedy_is_plain_greedy(target, draft, length, count):
    speculation = Speculation(draft=draft, num_draft_tokens=length)
    assert tokens_of(events(target, speculation, count)) == plain(target, count)
    assert count < 7 or speculation.drafted > 0


RIGGED = pytest.mark.parametrize(
    ("right", "accepted"),
    [
        (lambda number: False, 0),
        (lambda number: True, 4),
        (lambda number: number % 3 != 0, 2),  # the third is the target's own, so each round begins anew
    ],
    ids=["never", "always", "two of three"],
)


@RIGGED
def test_rigged_drafts(target, monkeypatch, right, accepted):
    told, add = [], Speculation.add_round
    monkeypatch.setattr(Speculation, "add_round", lambda *a, **more: (told.append(a[1:3]), add(*a, **more)))
    given = events(target, Speculation(draft=rigged(target, right), num_draft_tokens=4), 31)
    assert tokens_of(given) == plain(target, 31)
    assert {count for drafted, count in told if drafted == 4} == {accepted}
    assert [event.from_draft for event in given[1:]] == ([True] * accepted + [False]) * (30 // (accepted + 1))


@RIGGED
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_rigged_drafts_of_a_batch(target, right, accepted, compiled):
    """Prompts of several lengths, so that a row is told wrong things in other rounds than its neighbours."""
    prompts = [PROMPT, *OTHERS]
    speculation = Speculation(draft=rigged(target, right), num_draft_tokens=4)
    engine = engine_of(target, compiled=compiled, speculation=speculation)
    assert answers(engine, requests_of(prompts, 31)) == [plain(target, 31, prompt=ids) for ids in prompts]
    assert abs(speculation.acceptance_rate - {0: 0, 2: 0.5, 4: 1}[accepted]) < 0.1
    assert (engine.decoder.counters.compiled_steps > 0) == compiled


def test_a_batch_takes_as_many_passes_as_its_slowest_row_alone(target):
    """The draft is right up to place 40: rows with short prompts are fast for long, those with long ones never."""
    draft = spoiled(target, lambda place: place < 40)
    prompts = [PROMPT, [5, 9, 33], list(range(1, 31)), list(range(1, 46))]

    def passes(ids):
        speculation = Speculation(draft=draft, num_draft_tokens=4)
        found = answers(engine_of(target, speculation=speculation), requests_of(ids, 30))
        assert found == [plain(target, 30, prompt=each) for each in ids]
        return speculation.rounds

    alone = [passes([ids]) for ids in prompts]
    assert len(set(alone)) > 2
    assert passes(prompts) == max(alone)


@pytest.mark.parametrize("length", [1, 3, None])
@pytest.mark.parametrize("settings", [{}, {"temp": 1.0}, {"kv_bits": 8}], ids=str)
def test_rows_that_join_and_leave(target, draft, length, settings):
    """More prompts than rows, answers of several lengths, and one that somebody ends early."""
    prompts = [PROMPT, *OTHERS, PROMPT[:4], [1, 2, 3, 4, 5, 6]]
    requests = [
        Request(ids=ids, config=GenerateConfig(max_tokens=9 + 5 * number, seed=number, **settings))
        for number, ids in enumerate(prompts)
    ]
    speculation = Speculation(draft=draft, num_draft_tokens=length)
    engine = engine_of(target, batch_size=3, speculation=speculation)
    rows = [row for request in requests for row in engine.add(request)]
    while engine.busy:
        engine.step()
        if len(rows[1].tokens) == 4:
            engine.remove([rows[1]])
    alone = {}
    for row in rows:
        own = Speculation(draft=draft, num_draft_tokens=length)
        (alone[row],) = answers(engine_of(target, speculation=own), [row.request])
    assert [row.tokens for row in rows] == [alone[row][: 4 if row is rows[1] else None] for row in rows]
    if length is None or "temp" not in settings:
        assert [alone[row] for row in rows] == [answer(target, row.request.ids, row.request.config) for row in rows]
    assert speculation.drafted > 0


def test_a_stop_token_among_accepted_ones_ends_the_row_there(target):
    def run(stop):
        config = GenerateConfig(max_tokens=20, temp=1.0, seed=4)
        request = Request(ids=PROMPT, config=config, stop_token_ids=stop)
        return events_of(engine_of(target, speculation=Speculation(draft=target, num_draft_tokens=4)), [request])

    whole = run(frozenset())
    tokens = tokens_of(whole)
    assert [event.from_draft for event in whole] == [place % 5 != 0 for place in range(20)]
    for place in (1, 2, 4, 5, 8):
        stop = tokens[place]
        given = run(frozenset({stop}))
        assert tokens_of(given) == tokens[: tokens.index(stop) + 1]
        assert given[-1].finish_reason == "stop"


def test_the_end_of_the_context_ends_the_answer(target):
    speculation = Speculation(draft=rigged(target, lambda number: True), num_draft_tokens=8)
    given = events(target, speculation, 50, context_tokens=len(PROMPT) + 6)
    assert tokens_of(given) == plain(target, 6)
    assert given[-1].finish_reason == "length"


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("stop", [1, 4, 7, 22])
def test_what_is_kept_is_what_was_given_out(target, kv_bits, stop):
    """Also when the caller stops in the middle of what a round gave: the next prompt goes on from there."""
    whole = plain(target, 30, kv_bits=kv_bits)
    speculation = Speculation(draft=rigged(target, lambda number: number % 7 != 0), num_draft_tokens=4)
    prefixes = PrefixCache()
    engine = engine_of(target, speculation=speculation, prefix_cache=prefixes, keep_answers=True)
    (request,) = requests_of([PROMPT], 28, kv_bits=kv_bits)
    (row,) = engine.add(request)
    while len(row.tokens) < stop:
        engine.step()
    engine.remove([row])
    kept, known = prefixes.newest(prefix_owner(kv_bits=kv_bits)), [*PROMPT, *whole[:stop]]
    assert kept.ids in (known, known[:-1])
    cache = target.make_cache(quantized=kv_bits is not None)
    target(mx.array([kept.ids]), cache)
    for held, own in zip(kept.layers, cache):
        difference = held.keys[..., : len(kept.ids), :] - own.keys[..., : len(kept.ids), :]
        assert mx.abs(difference).max().item() <= (1 if kv_bits else 0.03)  # a step of the quantizers
    again = engine_of(target, speculation=speculation, prefix_cache=prefixes)
    (row,) = again.add(requests_of([known], 30 - stop, kv_bits=kv_bits)[0])
    events_of(again)
    assert row.tokens == whole[stop:]
    assert row.cached_tokens >= len(kept.ids) - 1


def test_the_drafts_prompt_is_read_once_for_a_conversation(target, monkeypatch):
    draft, read = tiny_model(seed=2, **DRAFT_SIZES), []
    speculation, prefixes = Speculation(draft=draft), PrefixCache()
    ids, call = list(PROMPT), type(draft.model).__call__

    def counted(model, tokens, *more):
        if len(model.layers) == 3:
            read.append(tokens.shape[1])
        return call(model, tokens, *more)

    monkeypatch.setattr(type(draft.model), "__call__", counted)
    for _ in range(3):
        read.clear()
        engine = engine_of(target, speculation=speculation, prefix_cache=prefixes, keep_answers=True)
        ids += [*answers(engine, requests_of([ids], 6))[0], 5, 6, 7]
        assert max(read) <= len(PROMPT)


def test_one_pass_of_the_target_for_each_round(target, monkeypatch):
    passes, call = [], type(target).__call__
    whole = plain(target, 31)
    monkeypatch.setattr(type(target), "__call__", lambda *a: (passes.append((type(a[0]), a[1].shape)), call(*a))[1])
    speculation = Speculation(draft=rigged(target, lambda number: True), num_draft_tokens=5)
    assert tokens_of(events(target, speculation, 31)) == whole
    assert [shape for kind, shape in passes if kind is type(target)] == [(1, 6)] * 5
    assert (speculation.rounds, speculation.acceptance_rate, speculation.tokens_per_round) == (5, 1.0, 6.0)


@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_a_round_waits_for_the_device_once(target, draft, monkeypatch, temp):
    waits, evaluate = [], mx.eval
    speculation = Speculation(draft=draft, num_draft_tokens=5)
    engine = engine_of(target, speculation=speculation)
    for request in requests_of([PROMPT, *OTHERS], 16, temp=temp):
        engine.add(request)
    engine.step()
    before = speculation.rounds
    monkeypatch.setattr(speculative.mx, "eval", lambda *arrays: (waits.append(arrays[0].ndim), evaluate(*arrays))[1])
    given = events_of(engine)
    assert waits.count(2) == speculation.rounds - before > 2
    assert len(waits) <= 2 * waits.count(2) + 2  # the other kind reads each row's own token, which is there already
    assert len(given) > 16


def test_log_probabilities_of_all_tokens(target):
    """Of accepted ones and the target's own, by the whole text before them."""
    sampler = Sampler(GenerateConfig(), top_logprobs=3)
    draft = rigged(target, lambda number: number % 3 != 0)
    request = Request(ids=PROMPT, samplers=(sampler,), max_tokens=25)
    given = events_of(engine_of(target, speculation=Speculation(draft=draft)), [request])
    tokens = tokens_of(given)
    logits = target(mx.array([PROMPT + tokens]))[0, len(PROMPT) - 1 : -1]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert {event.from_draft for event in given} == {True, False}
    for event, row in zip(given, expected):
        assert mx.abs(event.logprobs_V - row).max().item() < tolerances.LOGITS_QUANTIZED
        assert abs(event.token.logprob - row[event.token.token].item()) < tolerances.LOGITS_QUANTIZED
        assert len(event.token.top) == 3
        assert event.token.top[0][0] == event.token.token


def test_log_probabilities_beside_a_row_that_ends_within_a_round(target):
    """The row that ends has logits of its own; those of its neighbour stay where they are."""
    ends = Request(ids=OTHERS[0], config=GenerateConfig(max_tokens=4), logits_processors=[lambda _, logits: logits])
    (stays,) = requests_of([PROMPT], 12)
    given = events_of(engine_of(target, speculation=Speculation(draft=target, num_draft_tokens=5)), [ends, stays])
    events = [event for event in given if event.row.request is stays]
    logits = target(mx.array([PROMPT + tokens_of(events)]))[0, len(PROMPT) - 1 : -1]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert len(events) == 12
    for event, row in zip(events, expected):
        assert mx.abs(event.logprobs_V - row).max().item() < tolerances.LOGITS_QUANTIZED


def no_repeats(tokens, logits):
    return logits.at[:, tokens].add(-1e9)


@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_rows_whose_logits_depend_on_their_tokens(target, draft, temp):
    """They share rounds with others, and answer as in plain decoding, sampled or not."""
    config = GenerateConfig(max_tokens=30, temp=temp, seed=3)
    penalised = {"frequency_penalty": 0.7, "presence_penalty": 0.4, "logit_bias": {7: 2.0}}

    def requests():
        return [
            Request(ids=PROMPT, config=config, logits_processors=[no_repeats]),
            Request(ids=OTHERS[0], config=GenerateConfig(max_tokens=22)),
            Request(ids=OTHERS[1], samplers=(Sampler(config, **penalised),), max_tokens=30),
        ]

    expected = [answers(engine_of(target), [request])[0] for request in requests()]
    speculation = Speculation(draft=draft, num_draft_tokens=3)
    found = answers(engine_of(target, speculation=speculation), requests())
    assert found == expected
    assert len(set(found[0]) | set(PROMPT)) == 30 + len(set(PROMPT))
    same = Speculation(draft=target, num_draft_tokens=3)
    assert answers(engine_of(target, speculation=same), requests()) == expected
    assert same.acceptance_rate > 0.9  # the draft's logits are processed too


def test_a_processor_that_fails_ends_its_row_at_its_place(target):
    def fails(tokens, logits):
        if len(tokens) == len(PROMPT) + 6:
            raise ValueError("at the seventh")
        return logits

    requests = [
        Request(ids=PROMPT, config=GenerateConfig(max_tokens=20), logits_processors=[fails]),
        *requests_of(OTHERS[:2], 20),
    ]
    engine = engine_of(target, speculation=Speculation(draft=target, num_draft_tokens=4))
    rows = [row for request in requests for row in engine.add(request)]
    errors = []
    while engine.busy:
        errors += [(event.row, str(event.error)) for event in engine.step() if event.error is not None]
    assert errors == [(rows[0], "at the seventh")]
    assert [row.tokens for row in rows] == [
        plain(target, 20)[:6],
        *(plain(target, 20, prompt=ids) for ids in OTHERS[:2]),
    ]


def test_the_counts():
    speculation = Speculation(draft=None)
    assert speculation.summary()["acceptance_rate"] is None
    for drafted, accepted in ((5, 5), (5, 2), (2, 0)):
        speculation.add_round(drafted, accepted)
    told = {
        "rounds": 3,
        "draft_tokens": 12,
        "accepted_tokens": 7,
        "acceptance_rate": 7 / 12,
        "tokens_per_round": 10 / 3,
        "speed_up": None,
    }
    assert speculation.summary() == told


def test_the_speed_up_leaves_out_the_first_round():
    speculation = Speculation(draft=None)
    speculation.add_round(5, 5, seconds=9.0)
    assert speculation.speed_up is None
    speculation.plain_step_seconds = 0.5
    assert speculation.speed_up is None
    speculation.add_round(5, 3, seconds=0.5)
    speculation.add_round(5, 1, seconds=0.5)
    assert speculation.speed_up == 0.5 * 6 / 1.0


def test_stream_generate_takes_a_draft(model_folder):
    model, tokenizer = mlx_afm.load(model_folder)
    draft = tiny_model(vocab_size=512, **DRAFT_SIZES)
    plain = mlx_afm.generate(model, tokenizer, "sort vido.conf in reverse", max_tokens=20)
    for config in ({}, {"kv_bits": 8}):
        speculation = Speculation(draft=draft, compares=True)
        responses = list(
            mlx_afm.stream_generate(
                model, tokenizer, "sort vido.conf in reverse", max_tokens=20, speculation=speculation, **config
            )
        )
        assert "".join(response.text for response in responses) == plain
        assert sum(response.from_draft for response in responses) <= speculation.accepted < speculation.drafted
        assert speculation.speed_up > 0
    alone = Speculation(draft=model, num_draft_tokens=3)
    responses = list(
        mlx_afm.stream_generate(model, tokenizer, "sort vido.conf in reverse", max_tokens=9, speculation=alone)
    )
    assert [response.from_draft for response in responses[:5]] == [False, True, True, True, False]
    assert alone.speed_up is None


def test_a_draft_of_another_vocabulary_is_refused_when_it_is_used(model_folder):
    model, tokenizer = mlx_afm.load(model_folder)
    speculation = Speculation(draft=tiny_model(vocab_size=64, **DRAFT_SIZES))
    with pytest.raises(ConfigError, match=r"another vocabulary .expected 512 tokens, found 64 tokens"):
        mlx_afm.generate(model, tokenizer, "list the files", max_tokens=4, speculation=speculation)
    with pytest.raises(ConfigError, match="another vocabulary"):
        Chat(model=model, tokenizer=tokenizer, speculation=speculation)
    with pytest.raises(ConfigError, match="another vocabulary"):
        mlx_afm.batch_generate(model, tokenizer, ["list the files"], max_tokens=4, speculation=speculation)


def test_timing_plain_steps_leaves_the_cache(target, draft):
    speculation, prefixes = Speculation(draft=draft, compares=True), PrefixCache()
    engine = engine_of(target, speculation=speculation, prefix_cache=prefixes, keep_answers=True)
    (tokens,) = answers(engine, requests_of([PROMPT], 20))
    assert speculation.plain_step_seconds > 0
    assert prefixes.newest(prefix_owner()).ids in ([*PROMPT, *tokens], [*PROMPT, *tokens[:-1]])


def test_pairs_that_do_not_fit(target, draft, model_folder, tmp_path):
    require_pair(target, draft)
    with pytest.raises(ConfigError, match=r"another vocabulary .expected 61 tokens, found 64 tokens"):
        require_pair(target, tiny_model(vocab_size=64))
    _, tokenizer = mlx_afm.load(model_folder)
    shutil.copy(model_folder / "tokenizer.model", tmp_path / "tokenizer.model")
    data = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data.replace("▁shell".encode(), "▁sheLL".encode()))
    other = type(tokenizer).from_file(tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match=r"another tokenizer .found '▁shell' is 10 here and none there"):
        require_pair(target, draft, tokenizer, other)
    require_pair(target, draft, tokenizer, tokenizer)
    with pytest.raises(ConfigError, match=r"num_draft_tokens out of range .expected at least 1, found 0"):
        Speculation(draft=draft, num_draft_tokens=0)


@pytest.mark.parametrize("length", [3, None])
def test_a_round_that_fails_is_tried_again(target, draft, monkeypatch, length):
    """Nothing that was given out is lost or said twice."""
    engine = engine_of(target, speculation=Speculation(draft=draft, num_draft_tokens=length))
    prompts, calls, step = [PROMPT, *OTHERS], [], type(engine.decoder).step

    def fails(decoder, *arguments, **options):
        calls.append(1)
        if len(calls) % 5 == 0:
            raise RuntimeError("out of memory")
        return step(decoder, *arguments, **options)

    monkeypatch.setattr(type(engine.decoder), "step", fails)
    rows = [engine.add(request)[0] for request in requests_of(prompts, 20)]
    given = {row: [] for row in rows}
    failures = 0
    while engine.busy:
        try:
            for event in engine.step():
                given[event.row].append(event.token.token)
        except RuntimeError:
            failures += 1
    monkeypatch.undo()
    assert failures > 3
    assert list(given.values()) == [row.tokens for row in rows] == [plain(target, 20, prompt=ids) for ids in prompts]
