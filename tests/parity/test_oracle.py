"""Our model against the reference implementation, number by number."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import tolerances
from oracle import Oracle, greedy_agreement, hidden_of_every_layer, loss_and_gradient_errors


def limit(oracle: Oracle) -> float:
    return tolerances.LOGITS_QUANTIZED if oracle.quantized else tolerances.LOGITS


def difference(ours: mx.array, reference: np.ndarray) -> float:
    return float(np.abs(np.array(ours) - reference).max())


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_logits(oracle, name):
    model = oracle.base if name == "base" else oracle.adapted
    assert difference(model(oracle.tokens), oracle.outputs[f"logits_{name}"]) <= limit(oracle)


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_hidden_states_of_every_layer(oracle, name):
    model = oracle.base if name == "base" else oracle.adapted
    hidden, _, _ = hidden_of_every_layer(model, oracle.tokens)
    reference = oracle.outputs[f"hidden_{name}"]
    assert len(hidden) == len(reference)
    assert max(difference(ours, theirs) for ours, theirs in zip(hidden, reference)) <= limit(oracle)


def test_reused_keys_and_values(oracle):
    if not oracle.config.model.num_kv_reuse_layers:
        pytest.skip("a uniform stack reuses nothing")
    _, keys, values = hidden_of_every_layer(oracle.base, oracle.tokens)
    for ours, name in ((keys, "reused_key"), (values, "reused_value")):
        # One step of the quantizer where a boundary was crossed, which is rare; else float32 noise.
        assert difference(ours, oracle.outputs[name]) <= (0.03 if oracle.quantized else tolerances.LOGITS)
        assert np.mean(np.abs(np.array(ours) - oracle.outputs[name]) > tolerances.LOGITS) <= 1e-3


def test_packed_documents(oracle):
    documents = mx.array(oracle.outputs["packed_segment_ids"].astype(np.int32))
    logits = oracle.adapted.logits(oracle.adapted.hidden(oracle.tokens, documents=documents))
    assert difference(logits, oracle.outputs["packed_logits_adapter"]) <= limit(oracle)


def test_loss_and_every_adapter_gradient(oracle):
    loss, errors = loss_and_gradient_errors(oracle)
    assert loss <= limit(oracle)
    assert len(errors) == len(oracle.adapter_entries)
    assert max(errors.values()) <= tolerances.GRADIENT, max(errors, key=errors.get)


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_greedy_tokens_with_cache(oracle, name):
    equal, compared = greedy_agreement(oracle, name)
    assert equal == compared
    assert compared >= oracle.outputs[f"greedy_{name}"].size // 2


def test_a_left_padded_batch_equals_single_prompts(oracle):
    rows = np.array(oracle.tokens)
    lengths = [rows.shape[1] - 5, rows.shape[1]]
    padded = rows.copy()
    padded[0] = np.concatenate([np.zeros(5, np.int32), rows[0, :-5]])
    cache = oracle.adapted.make_cache(left_padding=[5, 0])
    batch = [oracle.adapted(mx.array(padded), cache=cache)]
    following = np.array([[3], [7]], np.int32)
    batch.append(oracle.adapted(mx.array(following), cache=cache))
    for row, length in enumerate(lengths):
        alone = mx.array(np.concatenate([padded[row, -length:], following[row]])[None])
        single = oracle.adapted(alone)[0]
        together = mx.concatenate([batch[0][row, -length:], batch[1][row]])
        assert mx.abs(single - together).max().item() <= limit(oracle)
