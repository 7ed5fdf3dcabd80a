"""Speculative decoding gives what the target alone gives: the same tokens greedily, the same distribution sampled."""

from __future__ import annotations

import itertools
import math
import shutil
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_afm
from mlx_afm.errors import ConfigError
from mlx_afm.generation import GenerateConfig, speculative
from mlx_afm.generation.chat import Chat
from mlx_afm.generation.speculation import MOST_DRAFT_TOKENS, Speculation, require_pair
from mlx_afm.generation.speculative import iter_speculative_steps, plain_step_seconds, verify_sampled
from mlx_afm.generation.steps import iter_steps
from tiny import tiny_model

PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7]
DRAFT_SIZES = {"num_layers": 3, "num_kv_reuse_layers": 0, "kv_quant": False}


@pytest.fixture(scope="module")
def target():
    return tiny_model(seed=1)


@pytest.fixture(scope="module")
def draft():
    return tiny_model(seed=2, **DRAFT_SIZES)


class Length:
    """The part of a cache that models without attention need."""

    def __init__(self):
        self.tokens = 0

    def size(self):
        return self.tokens

    def trim(self, tokens):
        self.tokens -= tokens

    state = mx.zeros(1)


class Told(nn.Module):
    """A model that says the logits `rows(place)` after the token at a place, whatever the tokens are."""

    def __init__(self, rows, layers=1):
        super().__init__()
        self.rows, self.layers = rows, (None,) * layers

    def make_cache(self):
        return [Length()]

    def __call__(self, tokens_BL, cache):
        places = range(cache[0].tokens, cache[0].tokens + tokens_BL.shape[1])
        cache[0].tokens = places.stop
        return mx.stack([self.rows(place) for place in places])[None]

    def next_logits(self, tokens_BL, cache):
        return self(tokens_BL, cache)[:, -1]

    def hidden(self, tokens_BL, cache):
        return self(tokens_BL, cache)


class Chain(Told):
    """A model for which the next token depends on the last one alone: logits (V, V), for ids modulo V."""

    def __init__(self, table):
        super().__init__(None)
        self.table = mx.array(table, mx.float32)

    def __call__(self, tokens_BL, cache):
        cache[0].tokens += tokens_BL.shape[1]
        return self.table[tokens_BL % len(self.table)]


def tokens_of(steps):
    return [step.token for step in steps]


def plain(model, count, config=None, **options):
    config = config or GenerateConfig()
    return tokens_of(iter_steps(model, PROMPT, config, cache=model.make_cache(), max_tokens=count, **options))


def faster(model, speculation, count, config=None, cache=None, **options):
    cache = cache or model.make_cache()
    config = config or GenerateConfig()
    return list(iter_speculative_steps(model, PROMPT, config, speculation, cache=cache, max_tokens=count, **options))


@pytest.mark.parametrize(("length", "count"), [(5, 1), (5, 2), (5, 7), (1, 20), (5, 50), (None, 50)])
def test_greedy_is_plain_greedy(target, draft, length, count):
    speculation = Speculation(draft=draft, num_draft_tokens=length)
    assert tokens_of(faster(target, speculation, count)) == plain(target, count)
    assert count < 7 or speculation.drafted > 0


def rigged(answer, right):
    """A draft that knows the answer, and tells it where `right` says so of the place in it."""

    def rows(place):
        number = place + 1 - len(PROMPT)
        known = answer[number] if 0 <= number < len(answer) else 0
        return mx.eye(61)[known if right(number) else (known + 1) % 61] * 9

    return Told(rows)


@pytest.mark.parametrize(
    ("right", "accepted"),
    [
        (lambda number: False, 0),
        (lambda number: True, 4),
        (lambda number: number % 3 != 0, 2),  # the third is the target's own, so each round begins anew
    ],
    ids=["never", "always", "two of three"],
)
def test_rigged_drafts(target, monkeypatch, right, accepted):
    answer, told = plain(target, 31), []
    monkeypatch.setattr(Speculation, "add_round", lambda self, drafted, count, seconds: told.append((drafted, count)))
    steps = faster(target, Speculation(draft=rigged(answer, right), num_draft_tokens=4), 31)
    assert tokens_of(steps) == answer
    assert {count for drafted, count in told if drafted == 4} == {accepted}
    assert [step.from_draft for step in steps[1:]] == ([True] * accepted + [False]) * (30 // (accepted + 1))


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


def test_the_number_of_tokens_follows_what_is_accepted(draft):
    lengths, large = [], Told(None, layers=30)  # ten times as many as the draft has
    for share in (0.0, 0.5, 1.0):
        speculation = Speculation(draft=draft, num_draft_tokens=None)
        for _ in range(60):
            length = speculation.next_length(large)
            speculation.add_round(length, int(length * share))
        lengths.append(length)
    assert lengths[0] == 1 < lengths[1] < lengths[2] == MOST_DRAFT_TOKENS


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "int8"])
@pytest.mark.parametrize("stop", [1, 4, 7, 22])
def test_the_caches_hold_what_was_given_out_but_the_last(target, quantized, stop):
    """Also when the caller stops in the middle of what a round gave; they go on as if nothing had been refused."""
    answer = plain(target, 30)
    speculation = Speculation(draft=rigged(answer, lambda number: number % 7 != 0), num_draft_tokens=4)
    cache, draft_cache = target.make_cache(quantized=quantized), speculation.draft.make_cache()
    steps = iter_speculative_steps(
        target, PROMPT, GenerateConfig(), speculation, cache=cache, draft_cache=draft_cache, max_tokens=28
    )
    given = tokens_of(itertools.islice(steps, stop))
    steps.close()
    assert given == answer[:stop]
    assert {layer.size() for layer in cache} == {len(PROMPT) + stop - 1}
    assert len(cache) == len(target.model.layers) < len(target.layers)
    assert draft_cache[0].size() <= len(PROMPT) + stop - 1
    known = [*PROMPT, *given]
    rest = iter_steps(target, known, GenerateConfig(), cache=cache, cached_tokens=len(known) - 1, max_tokens=30 - stop)
    assert tokens_of(rest) == answer[stop:]


def test_the_int8_cache_says_the_same(target, draft):
    cache = target.make_cache(quantized=True)
    assert tokens_of(faster(target, Speculation(draft=draft), 24, cache=cache)) == plain(target, 24)


def test_one_pass_of_the_target_for_each_round(target, monkeypatch):
    answer, passes = plain(target, 31), []
    call = type(target).__call__
    monkeypatch.setattr(type(target), "__call__", lambda *a: (passes.append(a[1].shape), call(*a))[1])
    speculation = Speculation(draft=rigged(answer, lambda number: True), num_draft_tokens=5)
    assert tokens_of(faster(target, speculation, 31)) == answer
    assert passes == [(1, 6)] * 5
    assert (speculation.rounds, speculation.acceptance_rate, speculation.tokens_per_round) == (5, 1.0, 6.0)


def test_a_round_waits_for_the_device_once(target, draft, monkeypatch):
    waits = []
    evaluate = mx.eval
    speculation = Speculation(draft=draft, num_draft_tokens=5)
    steps = iter_speculative_steps(
        target, PROMPT, GenerateConfig(temp=1.0), speculation, cache=target.make_cache(), max_tokens=16
    )
    next(steps)
    monkeypatch.setattr(speculative.mx, "eval", lambda *arrays: (waits.append(len(arrays)), evaluate(*arrays))[1])
    list(steps)
    assert len(waits) == speculation.rounds > 3


# Sampling. A chain of five tokens: what follows which is known exactly.

STATES = 5
LOGITS = np.random.default_rng(7).normal(0, 1.3, (2, STATES, STATES))
CONFIGS = {
    "plain": GenerateConfig(temp=1.0, seed=5),
    "hot": GenerateConfig(temp=1.7, seed=6),
    "narrow": GenerateConfig(temp=0.8, top_p=0.9, top_k=4, seed=7),
}


def expected_transitions(config):
    """Row by row, in loops and float64: filters on the probabilities first, the temperature afterwards."""
    table = np.zeros((STATES, STATES))
    for state, logits in enumerate(LOGITS[0]):
        probabilities = np.exp(logits) / np.exp(logits).sum()
        order, kept, mass = np.argsort(-probabilities), [], 0.0
        for token in order:
            if mass < config.top_p:
                kept.append(token)
            mass += probabilities[token]
        kept = kept[: config.top_k or STATES]
        weights = np.array([probabilities[t] ** (1 / config.temp) if t in kept else 0.0 for t in range(STATES)])
        table[state] = weights / weights.sum()
    return table


def deviation(tokens, config):
    """How many standard deviations chi-square of the transitions is above what it should be."""
    counts, expected = np.zeros((STATES, STATES)), expected_transitions(config)
    for (last, token), count in Counter(itertools.pairwise(tokens)).items():
        counts[last, token] = count
    wanted = counts.sum(axis=1, keepdims=True) * expected
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    degrees = possible.sum() - STATES
    chi_square = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum()
    return (chi_square - degrees) / math.sqrt(2 * degrees)


def sampled(config, count=1500):
    chain, other = (Chain(table) for table in LOGITS)
    return tokens_of(faster(chain, Speculation(draft=other, num_draft_tokens=3), count, config))


@pytest.mark.parametrize("name", CONFIGS)
def test_sampled_tokens_are_distributed_as_the_targets(name):
    assert deviation(sampled(CONFIGS[name]), CONFIGS[name]) < 3.5


def accept_by_the_targets_probability(target_MV, draft_NV, proposed_N, key):
    return verify_sampled(target_MV, mx.ones_like(draft_NV), proposed_N, key)


def own_token_from_the_target(target_MV, draft_NV, proposed_N, key):
    accepted, _ = verify_sampled(target_MV, draft_NV, proposed_N, key)
    own = mx.random.categorical(mx.log(target_MV[accepted]), key=mx.random.split(key)[0])
    return accepted, own.astype(mx.int32)


def accept_everything(target_MV, draft_NV, proposed_N, key):
    return verify_sampled(target_MV, draft_NV * 0, proposed_N, key)


@pytest.mark.parametrize("rule", [accept_by_the_targets_probability, own_token_from_the_target, accept_everything])
def test_wrong_rules_are_found_out(monkeypatch, rule):
    monkeypatch.setattr(speculative, "verify_sampled", rule)
    assert deviation(sampled(CONFIGS["plain"]), CONFIGS["plain"]) > 8


def test_the_share_accepted_is_what_the_two_have_in_common():
    """sum(min(p, q)) for each proposal; sampling both and comparing, as mlx-lm does, keeps sum(p q)."""
    target, draft = (np.exp(logits) / np.exp(logits).sum() for logits in LOGITS[:, 0])
    rng, accepted = np.random.default_rng(0), 0
    rows = mx.array(np.stack([target, target]), mx.float32), mx.array(draft[None], mx.float32)
    for trial, token in enumerate(rng.choice(STATES, 800, p=draft)):
        accepted += int(verify_sampled(*rows, mx.array([int(token)]), mx.random.key(trial))[0].item())
    common, equal = np.minimum(target, draft).sum(), (target * draft).sum()
    assert abs(accepted / 800 - common) < 4 * math.sqrt(common * (1 - common) / 800)
    assert common > equal + 0.1


def test_the_same_model_as_draft_is_always_accepted(target):
    speculation = Speculation(draft=target, num_draft_tokens=4)
    faster(target, speculation, 21, GenerateConfig(temp=1.0))
    assert speculation.acceptance_rate == 1.0


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "int8"])
def test_sampled_steps_are_judged_by_the_whole_text_before_them(target, draft, quantized):
    """So both caches hold what was accepted and nothing else, whatever was refused."""
    speculation, cache = Speculation(draft=draft, num_draft_tokens=3), target.make_cache(quantized=quantized)
    steps = faster(target, speculation, 30, GenerateConfig(temp=1.0, seed=3), cache=cache)
    assert 0 < speculation.accepted < speculation.drafted
    logits = target(mx.array([PROMPT + tokens_of(steps)]))[0, len(PROMPT) - 1 : -1]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert mx.abs(mx.stack([step.logprobs for step in steps]) - expected).max().item() < 1e-4


def test_a_seed_repeats_a_sample(target, draft):
    first, again, other = (
        tokens_of(faster(target, Speculation(draft=draft), 24, GenerateConfig(temp=1.0, seed=seed)))
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_processors_see_every_token_and_change_both_models(target, draft):
    def no_repeats(tokens, logits):
        return logits.at[:, tokens].add(-1e9)

    speculation = Speculation(draft=draft, num_draft_tokens=3)
    tokens = tokens_of(faster(target, speculation, 30, logits_processors=[no_repeats]))
    assert tokens == plain(target, 30, logits_processors=[no_repeats])
    assert len(set(tokens) | set(PROMPT)) == 30 + len(set(PROMPT))


def test_caches_that_begin_with_the_prompt(target, draft):
    cache, draft_cache = target.make_cache(), draft.make_cache()
    target(mx.array([PROMPT[:6]]), cache)
    draft(mx.array([PROMPT[:4]]), draft_cache)
    tokens = faster(target, Speculation(draft=draft), 20, cache=cache, cached_tokens=6, draft_cache=draft_cache)
    assert tokens_of(tokens) == plain(target, 20)


def test_timing_a_plain_step_leaves_the_cache(target):
    cache = target.make_cache()
    target(mx.array([PROMPT]), cache)
    assert plain_step_seconds(target, cache, 3) > 0
    assert {layer.size() for layer in cache} == {len(PROMPT)}


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
