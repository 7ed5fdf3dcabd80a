"""A row's answer is the same alone, in any batch, behind any cache, beside any adapter, plain, compiled or drafted.

Three hundred random rows. "The same" means equal tokens up to the first place where the reference hesitates: where its
best score leads the second by less than `MARGIN` (float32; BLAS adds in another order for other shapes). Such rows are
few.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from engine_runs import answers, engine_of, events_of

from mlx_afm.adapters import LoRAConfig
from mlx_afm.adapters.inference import AdapterStacks, own_weights
from mlx_afm.generation import Engine, GenerateConfig, PrefixCache, Request, Sampler, sampling
from mlx_afm.generation.decode import Decoder
from mlx_afm.generation.speculation import Speculation
from mlx_afm.model.inference import InferenceModel
from tiny import tiny_model, with_adapter

MARGIN = 1e-4
ROWS, COMPILED_ROWS = 250, 50
ADAPTERS = {
    "small": LoRAConfig(rank=4, targets=("q", "v")),
    "other": LoRAConfig(rank=4, targets=("q", "v")),
    "whole": LoRAConfig(rank=8),
    "late": LoRAConfig(rank=16, targets=("gate", "down", "o"), layers="last-3"),
}
COMMON = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]


@dataclass
class Models:
    """A model, its inference form with all adapters, and for each adapter a model that has it alone."""

    form: InferenceModel
    stacks: AdapterStacks
    alone: dict
    drafts: list


@pytest.fixture(scope="module")
def models():
    base = tiny_model()
    form = InferenceModel(base)
    stacks, alone = AdapterStacks(form), {None: base}
    for number, (name, config) in enumerate(ADAPTERS.items()):
        alone[name] = with_adapter(tiny_model(), config, seed=number + 1)
        stacks.add(name, *own_weights(alone[name]))
    drafts = [base, tiny_model(seed=4, num_layers=2, num_kv_reuse_layers=0, kv_quant=False)]
    return Models(form, stacks, alone, drafts)


def random_request(rng, kv_bits):
    """A prompt that may begin as others do, with an adapter, settings and an end of its own."""
    ids = [*COMMON[: rng.integers(0, 11)], *rng.integers(1, 61, rng.integers(1, 30)).tolist()]
    boundaries = None
    if rng.random() < 0.4:
        boundaries = sorted({int(place) for place in rng.integers(1, len(ids) + 1, 2)})
    kind = rng.choice(["greedy", "sampled", "filtered"])
    settings = {
        "greedy": {},
        "sampled": {"temp": float(rng.uniform(0.4, 1.5))},
        "filtered": {"temp": 0.9, "top_p": 0.9, "top_k": 30},
    }[kind]
    config = GenerateConfig(
        seed=int(rng.integers(0, 1000)), kv_bits=kv_bits, prefill_step_size=int(rng.choice([5, 17, 2048])), **settings
    )
    return {
        "ids": ids,
        "config": config,
        "max_tokens": int(rng.integers(1, 16)),
        "stop_token_ids": frozenset(rng.integers(1, 61, 2).tolist()),
        "adapter": rng.choice([None, *ADAPTERS]),
        "prefix_boundaries": boundaries,
    }, {"frequency_penalty": 0.5, "logit_bias": {3: 1.5}} if rng.random() < 0.2 else {}


def as_request(fields, penalties):
    """A request anew: a sampler belongs to one answer."""
    return Request(**fields, samplers=(Sampler(fields["config"], prompt=fields["ids"], **penalties),))


def first_difference(tokens, expected):
    length = min(len(tokens), len(expected))
    different = (place for place in range(length) if tokens[place] != expected[place])
    return next(different, None if len(tokens) == len(expected) else length)


def hesitates(event, place):
    """Whether the reference's two best scores at a place are nearly equal."""
    config, logprobs = event.row.sampler.config, event.logprobs_V[None]
    scores = logprobs
    if config.temp > 0:
        key = mx.random.key((config.seed + place * sampling._STRIDE) % 2**64)
        noise = mx.random.gumbel((logprobs.shape[-1],), key=key)
        scores = sampling.filter_logits(logprobs, config) / config.temp + noise
    best = sorted(scores[0].tolist())[-2:]
    return best[1] - best[0] < MARGIN


def check(models, rows, found):
    """Compares answers with those of each row alone, without stacks of adapters; returns how many hesitated."""
    hesitated = 0
    for (fields, penalties), tokens in zip(rows, found):
        request = as_request({**fields, "adapter": None, "prefix_boundaries": None}, penalties)
        events = events_of(engine_of(models.alone[fields["adapter"]]), [request])
        expected = [event.token.token for event in events]
        place = first_difference(tokens, expected)
        if place is not None:
            assert place < len(expected), (tokens, expected)
            assert hesitates(events[place], place), (fields, tokens, expected)
            hesitated += 1
    return hesitated


def scenario(models, rng, rows, decoder=None, **options):
    """Answers of rows that come at random times to one engine."""
    decoder = decoder or Decoder(models.form, compiled=False)
    if rng.random() < 0.7:
        options["prefix_cache"] = PrefixCache(int(rng.choice([20_000, 1 << 26])))
    engine = Engine(
        decoder,
        routes=models.stacks.routes,
        prompts_first=bool(rng.random() < 0.5),
        keep_answers=bool(rng.random() < 0.5),
        **options,
    )
    waiting, taken = list(rows), []
    while waiting or engine.busy:
        while waiting and rng.random() < 0.6:
            taken += engine.add(as_request(*waiting.pop(0)))
        if engine.busy:
            engine.step()
    return [row.tokens for row in taken]


def test_random_rows(models):
    rng, hesitated = np.random.default_rng(0), 0
    for number in range(ROWS // 10):
        kv_bits = [None, None, 8][number % 3]
        rows = [random_request(rng, kv_bits) for _ in range(10)]
        options = {"batch_size": int(rng.choice([1, 2, 3, 5, 10]))}
        if number % 2:  # with a number of proposals that adapts, sampled rows too have the tokens of plain decoding
            options["speculation"] = Speculation(draft=models.drafts[number % 4 // 2], num_draft_tokens=None)
        hesitated += check(models, rows, scenario(models, rng, rows, **options))
    assert hesitated <= 0.02 * ROWS


@pytest.mark.parametrize("length", [None, 4], ids=["plain", "draft"])
def test_random_rows_compiled(models, length):
    """Every step but the first two of a batch is compiled."""
    rng = np.random.default_rng(1)
    decoder = Decoder(models.form, compiled=True, plain_steps=2)
    hesitated = 0
    for _ in range(COMPILED_ROWS // 10 if length is None else 1):
        rows = [random_request(rng, None) for _ in range(10)]
        options = {"batch_size": 4}
        if length is not None:
            options["speculation"] = Speculation(draft=models.drafts[0], num_draft_tokens=length)
            for fields, _ in rows:  # sampled rows have answers of their own with a fixed number of proposals
                fields["config"] = GenerateConfig()
        hesitated += check(models, rows, scenario(models, rng, rows, decoder, **options))
    assert decoder.counters.compiled_steps > decoder.counters.plain_steps
    assert hesitated <= 2


def test_a_thousand_tokens_of_a_row_are_few_traces(models):
    decoder = Decoder(models.form, compiled=True)
    (tokens,) = answers(
        Engine(decoder, routes=models.stacks.routes),
        [Request(ids=[1, 2, 3], config=GenerateConfig(max_tokens=1000, temp=1.0), adapter="whole")],
    )
    assert len(tokens) == 1000
    assert decoder.counters.traces <= 5
    assert (decoder.counters.plain_steps, decoder.counters.compiled_steps) == (16, 983)
