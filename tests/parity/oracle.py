"""Oracle folders: made, loaded into our model, and measured against it; for tests and for the figures in docs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import tolerances
from mlx_afm.adapters import add_adapter, read_adapter, set_adapter_weights
from mlx_afm.checkpoints.arrays import to_mlx
from mlx_afm.checkpoints.mlx_checkpoint import model_tensors
from mlx_afm.checkpoints.names import TensorEntry, plan_adapter
from mlx_afm.checkpoints.toolkit import find_toolkit_files, read_toolkit_checkpoint
from mlx_afm.data import Batch
from mlx_afm.model import Model, ToolkitConfig
from mlx_afm.training.step import batch_loss

COMMITTED = Path(__file__).parent.parent / "fixtures" / "oracle"
SHARED = Path(os.environ.get("MLX_AFM_SHARED", Path(__file__).parents[3] / "shared"))
SCRIPT = SHARED / "reference" / "make_tamm_checkpoint.py"
# The script's default sizes; other head counts; a uniform stack. With and without quantizers.
HEADS = ["--heads", "8", "--kv-heads", "1", "--hidden", "96", "--layers", "2", "--reuse-layers", "3", "--seed", "3"]
UNIFORM = ["--layers", "4", "--reuse-layers", "0", "--seed", "5"]
FRESH = {
    "default": [],
    "heads": HEADS,
    "uniform": UNIFORM,
    "default-plain": ["--no-kv-quant"],
    "heads-plain": [*HEADS, "--no-kv-quant"],
    "uniform-plain": [*UNIFORM, "--no-kv-quant"],
}


@dataclass
class Oracle:
    folder: Path
    config: ToolkitConfig
    base: Model
    adapted: Model
    outputs: dict[str, np.ndarray]

    @property
    def tokens(self) -> mx.array:
        return mx.array(self.outputs["input_ids"].astype(np.int32))

    @property
    def quantized(self) -> bool:
        return self.config.model.kv_quant

    @property
    def adapter_entries(self) -> list[TensorEntry]:
        return plan_adapter(self.config.model, self.config.adapter)


def load_oracle(folder: Path) -> Oracle:
    checkpoint = read_toolkit_checkpoint(find_toolkit_files(folder))
    models = []
    for _ in range(2):
        model = Model(checkpoint.config.model)
        model.load_weights([(name, to_mlx(tensor)) for name, tensor in model_tensors(checkpoint, None).items()])
        models.append(model)
    base, adapted = models
    adapter = read_adapter(folder / "adapter-final.pt", checkpoint.config.model, checkpoint.config.adapter.scale)
    add_adapter(adapted, adapter.config)
    set_adapter_weights(adapted, {name: to_mlx(t) for name, t in adapter.weights.items()}, where=folder)
    with np.load(folder / "logits.npz") as arrays:
        outputs = {name: arrays[name] for name in arrays.files}
    return Oracle(folder, checkpoint.config, base, adapted, outputs)


def make_oracle(folder: Path, *options: str) -> Path:
    """Runs the oracle script."""
    pytest.importorskip("tamm", reason="the parity extra is not installed")
    if not SCRIPT.is_file():
        pytest.skip(f"{SCRIPT} is missing: set MLX_AFM_SHARED")
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(folder), *options], check=True, capture_output=True)
    return folder


class Recorder:
    """Stands in for a layer and keeps what it returns."""

    def __init__(self, layer: nn.Module, seen: list) -> None:
        self.layer, self.seen = layer, seen

    def __call__(self, *args, **kwargs):
        output = self.layer(*args, **kwargs)
        self.seen.append(output)
        return output


def hidden_of_every_layer(model: Model, tokens: mx.array) -> tuple[list[mx.array], mx.array, mx.array]:
    """Embeddings and the output of each layer; keys and values of the last ordinary layer, (B, S, K * E)."""
    inner, seen = model.model, []
    plain = inner.layers, inner.kv_reuse_layers
    inner.layers, inner.kv_reuse_layers = ([Recorder(layer, seen) for layer in layers] for layers in plain)
    try:
        model.hidden(tokens)
    finally:
        inner.layers, inner.kv_reuse_layers = plain
    outputs = [output[0] if isinstance(output, tuple) else output for output in seen]
    _, keys, values = next(output for output in reversed(seen) if isinstance(output, tuple))
    keys, values = (a.transpose(0, 2, 1, 3).reshape(a.shape[0], a.shape[2], -1) for a in (keys, values))
    return [inner.embedding(tokens), *outputs], keys, values


def training_batch(oracle: Oracle) -> Batch:
    """The reference's labels as a batch of ours: only the labelled positions are computed."""
    labels = oracle.outputs["labels"]
    columns = np.flatnonzero(labels[0] >= 0)
    assert (labels >= 0).sum() == len(labels) * len(columns), "the oracle labels the same columns in every row"
    needed = np.broadcast_to(columns, (len(labels), len(columns))).astype(np.int32)
    targets = labels[:, columns].astype(np.int32)
    return Batch(oracle.tokens, mx.array(needed), mx.array(targets), mx.ones(targets.shape))


def loss_and_gradient_errors(oracle: Oracle) -> tuple[float, dict[str, float]]:
    """Difference of the mean loss; for each adapter tensor |difference| / |reference|, by our names."""
    batch = training_batch(oracle)
    count = batch.weights_BN.sum()
    loss, found = nn.value_and_grad(oracle.adapted, lambda m: batch_loss(m, batch) / count)(oracle.adapted)
    ours, errors = dict(tree_flatten(found)), {}
    for entry in oracle.adapter_entries:
        reference = oracle.outputs[f"grad/{entry.toolkit}"]
        difference = np.linalg.norm(np.array(ours.pop(entry.ours)) - reference)
        errors[entry.ours] = float(difference / np.linalg.norm(reference))
    assert not ours, "gradients that the reference does not have"
    return abs(loss.item() - float(oracle.outputs["loss"])), errors


def greedy_agreement(oracle: Oracle, name: str) -> tuple[int, int]:
    """Cached greedy tokens equal to the reference's, and how many were compared.

    Compared is, in each row, everything before the first token whose lead is unclear: after it a row
    may rightly go its own way.
    """
    model = oracle.base if name == "base" else oracle.adapted
    wanted, margins = oracle.outputs[f"greedy_{name}"], oracle.outputs[f"greedy_{name}_margin"]
    cache, step, ours = model.make_cache(), oracle.tokens, []
    for _ in range(wanted.shape[1]):
        step = mx.argmax(model(step, cache=cache)[:, -1:], axis=-1)
        ours.append(np.array(step))
    clear = np.cumprod(margins > tolerances.GREEDY_MARGIN, axis=1).astype(bool)
    return int((np.concatenate(ours, axis=1) == wanted)[clear].sum()), int(clear.sum())
