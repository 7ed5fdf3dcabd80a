"""What a batch, a draft and a model's decoder hold: enough for each step, and nothing longer than needed."""

from __future__ import annotations

import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest
from engine_runs import answer, engine_of, events_of

import tolerances
from mlx_afm.generation import GenerateConfig, Request
from mlx_afm.generation.batch_cache import ROOM_TOKENS
from mlx_afm.generation.draft_length import DraftLength
from mlx_afm.generation.forms import decoder_of
from mlx_afm.generation.speculation import Speculation
from tiny import tiny_model


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_row_that_outgrows_its_room_goes_on_as_the_model_would(compiled):
    """Each token has the log probability that the model gives it without any cache."""
    model, count = tiny_model(), 8
    ids = np.random.default_rng(0).integers(1, 61, ROOM_TOKENS - 3).tolist()
    request = Request(ids=ids, config=GenerateConfig(max_tokens=count))
    events = events_of(engine_of(model, compiled=compiled), [request])
    assert len(events) == count
    logits = model(mx.array([[*ids, *(event.token.token for event in events)]]))[0, -count - 1 : -1]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for event, wanted in zip(events, logprobs):
        assert mx.abs(event.logprobs_V - wanted).max().item() < tolerances.LOGITS_QUANTIZED


def test_a_draft_reads_all_tokens_of_plain_steps_before_it_proposes(monkeypatch):
    """Of a draft that is the target itself all proposals are accepted, also after many plain steps."""
    model, planned = tiny_model(), iter([0] * 8)
    monkeypatch.setattr(DraftLength, "plan", lambda *_: next(planned, 4))
    speculation = Speculation(draft=model, num_draft_tokens=None)
    config = GenerateConfig(max_tokens=30)
    assert answer(model, [5, 9, 33], config, speculation=speculation) == answer(model, [5, 9, 33], config)
    assert speculation.drafted == speculation.accepted > 0


def test_models_that_are_dropped_take_their_decoders_along():
    models = [tiny_model() for _ in range(8)]
    forms = [weakref.ref(decoder_of(model).decoder.form) for model in models]
    gc.collect()
    assert all(form() is not None for form in forms)
    del models
    gc.collect()
    assert all(form() is None for form in forms)
