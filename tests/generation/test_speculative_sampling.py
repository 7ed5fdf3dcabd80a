"""Sampled, tokens have the target's distribution: a chain of five tokens against its exact transitions."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from engine_runs import answer, answers, chain, engine_of, events_of

import tolerances
from mlx_afm.generation import GenerateConfig, Request, speculative
from mlx_afm.generation.speculation import Speculation
from mlx_afm.generation.speculative import verify_sampled
from tiny import tiny_model

PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7]
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


def deviation(answers, config):
    """How many standard deviations chi-square of the transitions is above what it should be."""
    counts, expected = np.zeros((STATES, STATES)), expected_transitions(config)
    for (last, token), count in Counter(itertools.chain.from_iterable(map(itertools.pairwise, answers))).items():
        counts[last, token] = count
    wanted = counts.sum(axis=1, keepdims=True) * expected
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    degrees = possible.sum() - STATES
    chi_square = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum()
    return (chi_square - degrees) / math.sqrt(2 * degrees)


@pytest.fixture(scope="module")
def target():
    return tiny_model(seed=1)


@pytest.fixture(scope="module")
def draft():
    return tiny_model(seed=2, num_layers=3, num_kv_reuse_layers=0, kv_quant=False)


def tokens_of(model, speculation, config, prompt=PROMPT):
    return answers(engine_of(model, speculation=speculation), [Request(ids=prompt, config=config)])[0]


def sampled(config, count=1500, length=3, rows=6):
    """Answers of a chain with another chain as draft, joined."""
    target, draft = (chain(table, vocab_size=STATES) for table in LOGITS)
    configs = [
        GenerateConfig(**{**vars(config), "seed": config.seed + 100 * row, "max_tokens": count // rows})
        for row in range(rows)
    ]
    engine = engine_of(target, speculation=Speculation(draft=draft, num_draft_tokens=length))
    return answers(engine, [Request(ids=[1], config=each) for each in configs])


@pytest.mark.parametrize(
    ("name", "length", "rows"), [("plain", 3, 1), *((name, length, 6) for name in CONFIGS for length in (3, None))]
)
def test_sampled_tokens_are_distributed_as_the_targets(name, length, rows):
    assert deviation(sampled(CONFIGS[name], length=length, rows=rows), CONFIGS[name]) < 3.5


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
    for length in (4, None):
        speculation = Speculation(draft=target, num_draft_tokens=length)
        tokens_of(target, speculation, GenerateConfig(temp=1.0, max_tokens=21))
        assert speculation.acceptance_rate == 1.0


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_sampled_tokens_are_judged_by_the_whole_text_before_them(target, draft, kv_bits):
    """So both caches hold what was accepted and nothing else, whatever was refused."""
    speculation = Speculation(draft=draft, num_draft_tokens=3)
    request = Request(ids=PROMPT, config=GenerateConfig(temp=1.0, seed=3, kv_bits=kv_bits, max_tokens=30))
    given = events_of(engine_of(target, speculation=speculation), [request])
    assert 0 < speculation.accepted < speculation.drafted
    tokens = [event.token.token for event in given]
    logits = target(mx.array([PROMPT + tokens]))[0, len(PROMPT) - 1 : -1]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    found = mx.stack([event.logprobs_V for event in given])
    assert mx.abs(found - expected).max().item() < tolerances.LOGITS_QUANTIZED


def test_a_seed_repeats_a_sample(target, draft):
    first, again, other = (
        tokens_of(target, Speculation(draft=draft), GenerateConfig(temp=1.0, seed=seed, max_tokens=24))
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("length", [1, 3, 6])
def test_a_sampled_row_does_not_depend_on_its_neighbours(target, draft, length):
    """Whatever their settings and lengths are, and however many proposals they need at their ends."""
    rng = np.random.default_rng(length)
    requests = [
        Request(
            ids=rng.integers(1, 61, int(rng.integers(1, 20))).tolist(),
            config=GenerateConfig(temp=temp, top_p=top_p, seed=seed, max_tokens=int(rng.integers(2, 30))),
        )
        for seed, (temp, top_p) in enumerate([(1.0, 1.0), (0.7, 0.9), (1.3, 1.0), (0.0, 1.0), (1.0, 0.8)] * 2)
    ]
    alone = [
        answers(engine_of(target, speculation=Speculation(draft=draft, num_draft_tokens=length)), [request])[0]
        for request in requests
    ]
    for batch_size in (2, 5, 10):
        speculation = Speculation(draft=draft, num_draft_tokens=length)
        assert answers(engine_of(target, speculation=speculation, batch_size=batch_size), requests) == alone


def test_with_a_number_that_adapts_a_sampled_answer_is_the_plain_one(target, draft):
    for seed in range(4):
        config = GenerateConfig(temp=1.0, seed=seed, max_tokens=60)
        speculation = Speculation(draft=draft, num_draft_tokens=None)
        assert tokens_of(target, speculation, config) == answer(target, PROMPT, config)
        assert speculation.rounds > 0


def test_every_round_of_every_seed_has_randomness_of_its_own(monkeypatch):
    target, draft = tiny_model(), tiny_model(seed=1)
    keys = []

    def record(target_MV, draft_NV, proposed_N, key):
        keys.append(tuple(key.tolist()))
        return verify_sampled(target_MV, draft_NV, proposed_N, key)

    monkeypatch.setattr(speculative, "verify_sampled", record)
    for seed in (0, 1, 2):
        engine = engine_of(target, speculation=Speculation(draft=draft, num_draft_tokens=2))
        answers(engine, [Request(ids=PROMPT, config=GenerateConfig(temp=1.0, seed=seed, max_tokens=16))])
    assert len(keys) == len(set(keys)) > 12
