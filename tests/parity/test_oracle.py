"""Our model against the reference implementation, number by number."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import tolerances
from mlx_afm.data import Batch
from mlx_afm.model import Model
from mlx_afm.training.step import batch_loss
from oracle import Oracle


def limit(oracle: Oracle) -> float:
    return tolerances.LOGITS_QUANTIZED if oracle.quantized else tolerances.LOGITS


def difference(ours: mx.array, reference: np.ndarray) -> float:
    return float(np.abs(np.array(ours) - reference).max())


class Recorder:
    """Stands in for a layer and keeps what it returns."""

    def __init__(self, layer: nn.Module, seen: list) -> None:
        self.layer, self.seen = layer, seen

    def __call__(self, *args, **kwargs):
        output = self.layer(*args, **kwargs)
        self.seen.append(output)
        return output


def hidden_of_every_layer(model: Model, tokens: mx.array) -> tuple[list[mx.array], mx.array, mx.array]:
    """Embeddings and the output of each layer; keys and values of the last ordinary layer."""
    inner, seen = model.model, []
    plain = inner.layers, inner.kv_reuse_layers
    inner.layers, inner.kv_reuse_layers = ([Recorder(layer, seen) for layer in layers] for layers in plain)
    try:
        model.hidden(tokens)
    finally:
        inner.layers, inner.kv_reuse_layers = plain
    outputs = [output[0] if isinstance(output, tuple) else output for output in seen]
    _, keys, values = next(output for output in reversed(seen) if isinstance(output, tuple))
    return [inner.embedding(tokens), *outputs], keys, values


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
        batch, _, length, _ = ours.shape
        flat = ours.transpose(0, 2, 1, 3).reshape(batch, length, -1)
        # One rounding step of the quantiser where a boundary was crossed, else float32 noise.
        assert difference(flat, oracle.outputs[name]) <= (0.03 if oracle.quantized else tolerances.LOGITS)
        assert np.mean(np.abs(np.array(flat) - oracle.outputs[name]) > tolerances.LOGITS) <= 1e-3


def test_packed_documents(oracle):
    documents = mx.array(oracle.outputs["packed_segment_ids"].astype(np.int32))
    logits = oracle.adapted.logits(oracle.adapted.hidden(oracle.tokens, documents=documents))
    assert difference(logits, oracle.outputs["packed_logits_adapter"]) <= limit(oracle)


def training_batch(oracle: Oracle) -> Batch:
    """The reference's labels as a batch of ours: only the labelled positions are computed."""
    labels = oracle.outputs["labels"]
    columns = np.flatnonzero(labels[0] >= 0)
    assert (labels[:, columns] >= 0).all(), "the oracle labels the same columns in every row"
    assert (labels >= 0).sum() == len(labels) * len(columns), "the oracle labels the same columns in every row"
    needed = np.broadcast_to(columns, (len(labels), len(columns))).astype(np.int32)
    targets = labels[:, columns].astype(np.int32)
    return Batch(oracle.tokens, mx.array(needed), mx.array(targets), mx.ones(targets.shape))


def test_loss_and_every_adapter_gradient(oracle):
    batch = training_batch(oracle)
    count = batch.weights_BN.sum()
    loss, gradients = nn.value_and_grad(oracle.adapted, lambda m: batch_loss(m, batch) / count)(oracle.adapted)
    assert abs(loss.item() - float(oracle.outputs["loss"])) <= limit(oracle)
    ours = dict(tree_flatten(gradients))
    worst = {}
    for entry in oracle.adapter_entries:
        reference = oracle.outputs[f"grad/{entry.toolkit}"]
        error = np.linalg.norm(np.array(ours[entry.ours]) - reference) / np.linalg.norm(reference)
        worst[entry.ours] = error
        assert np.linalg.norm(reference) > 0, f"{entry.ours}: no gradient in the reference"
    assert max(worst.values()) <= tolerances.GRADIENT, max(worst, key=worst.get)
    assert len(ours) == len(worst) == len(oracle.adapter_entries)


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_greedy_tokens_with_cache(oracle, name):
    """Every token whose lead over the second is clear; after an unclear one, the row may go its own way."""
    model = oracle.base if name == "base" else oracle.adapted
    wanted, margins = oracle.outputs[f"greedy_{name}"], oracle.outputs[f"greedy_{name}_margin"]
    cache, tokens, ours = model.make_cache(), oracle.tokens, []
    for _ in range(wanted.shape[1]):
        tokens = mx.argmax(model(tokens, cache=cache)[:, -1:], axis=-1)
        ours.append(np.array(tokens))
    ours = np.concatenate(ours, axis=1)
    compared = 0
    for row in range(len(wanted)):
        unclear = np.flatnonzero(margins[row] <= tolerances.GREEDY_MARGIN)
        clear = wanted.shape[1] if not len(unclear) else unclear[0]
        assert ours[row, :clear].tolist() == wanted[row, :clear].tolist()
        compared += clear
    assert compared >= wanted.size // 2


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
