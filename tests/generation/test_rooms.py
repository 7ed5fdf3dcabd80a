"""What a batch, a draft and a model's decoder hold: enough for each step, and nothing longer than needed."""

from __future__ import annotations

import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest
from engine_runs import answer, engine_of, events_of
from mlx.utils import tree_flatten, tree_map

import tolerances
from mlx_afm.generation import GenerateConfig, Request
from mlx_afm.generation.batch_cache import ROOM_TOKENS
from mlx_afm.generation.decode import PLAIN_STEPS, SWITCH
from mlx_afm.generation.draft_length import DraftLength
from mlx_afm.generation.engine import Engine
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


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_replaced_weights_leave_memory(compiled, monkeypatch):
    """Weights are constants of a compiled step; when others take their place, nothing holds the old ones."""
    monkeypatch.setenv(SWITCH, str(int(compiled)))
    model = tiny_model(hidden_dim=256, vocab_size=4096)
    config, held, tokens = GenerateConfig(max_tokens=PLAIN_STEPS + 4), [], []
    for round in range(4):
        model.update(tree_map(lambda array, scale=0.9**round: array * scale, model.parameters()))
        mx.eval(model.parameters())
        decoder = decoder_of(model)
        engine = Engine(decoder.decoder, routes=decoder.routes)
        (row,) = engine.add(Request(ids=[5, 9, 33], config=config))
        while engine.busy:
            engine.step()
        tokens.append(row.tokens)
        assert (decoder.decoder.counters.compiled_steps > 0) == compiled
        del engine, decoder, row
        gc.collect()
        mx.clear_cache()
        held.append(mx.get_active_memory())
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert max(held) - min(held) < 0.05 * size
    assert len(set(map(tuple, tokens))) > 1  # the new weights are the ones that answer
