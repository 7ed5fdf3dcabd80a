"""A tiny AFM pretrained on tldr, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import mlx_afm
from mlx_afm.checkpoints.arrays import from_mlx
from mlx_afm.checkpoints.mlx_checkpoint import write_config
from mlx_afm.data import DataConfig, Tokens, padded_batch, read_tokens
from mlx_afm.formats.mlx_folder import write_shards
from mlx_afm.model import AFMConfig, Model
from mlx_afm.text.hf_tokenizer import write_hf_tokenizer
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.training import Event, Hooks, TrainConfig, train
from mlx_afm.workflows.demo import ASSETS

SIZES = {
    "hidden_dim": 128,
    "hidden_dim_scale_factor": 2,
    "num_layers": 4,
    "num_kv_reuse_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
}
KEY_RANGE = 8.0  # keys are normed, and values of normed inputs stay within it too
READ_WEIGHT = 0.2  # of a request's tokens in pretraining
READING = DataConfig(system=None)
TOKENIZER = ASSETS / "tokenizer.model"
BATCH = 64


def read(path: Path) -> list[Tokens]:
    return list(read_tokens((path,), TOKENIZER, READING))


def pretrain(
    data: Path, folder: Path, config: TrainConfig, on_event: Callable[[Event], None], sizes: Mapping[str, int] = SIZES
) -> float:
    """Writes the model folder; returns the validation loss."""
    mx.random.seed(config.seed)
    model = Model(AFMConfig(vocab_size=AFMTokenizer.from_file(TOKENIZER).vocab_size, **sizes))
    for layer in model.model.layers:
        layer.self_attn.quant_key_scale = mx.array(KEY_RANGE / 127)
        layer.self_attn.quant_value_scale = mx.array(KEY_RANGE / 127)
    model.freeze(keys=["quant_key_scale", "quant_value_scale"])
    examples = [
        replace(tokens, weights=np.maximum(tokens.weights, np.float32(READ_WEIGHT)))
        for tokens in read(data / "train.jsonl")
    ]
    done = train(model, examples, read(data / "valid.jsonl"), config, Hooks(on_event=on_event))
    folder.mkdir(parents=True)
    write_shards(folder, {name: from_mlx(array) for name, array in tree_flatten(model.parameters())})
    tokenizer = AFMTokenizer.from_file(TOKENIZER)
    write_hf_tokenizer(TOKENIZER, folder)
    stops = {"eos_token_id": [tokenizer.turn_end_id, tokenizer.eos_id], "pad_token_id": tokenizer.pad_id}
    write_config(folder, model.args, {**stops, "torch_dtype": "float32"})
    assert done.best_loss is not None
    return done.best_loss


def loss_of(folder: Path, adapter: Path | None, file: Path) -> float:
    return mlx_afm.score(folder, adapter, file, batch_size=BATCH, data_config=READING).loss


def exact_match(folder: Path, adapter: Path | None, file: Path) -> float:
    """Share of examples whose greedy answer is the wanted one, end of turn included, in percent.

    A greedy answer is the wanted one just if each of its tokens is the likeliest after those before it, so one pass
    over the wanted answers tells.
    """
    model, _ = mlx_afm.load(folder, adapter)
    rows, right = read(file), 0
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(rows), BATCH):
        batch = padded_batch([rows[index] for index in order[start : start + BATCH]])
        hidden = model.hidden(batch.inputs_BL, output_positions=batch.output_positions_BN)
        hits = (mx.argmax(model.logits(hidden), axis=-1) == batch.targets_BN) | (batch.weights_BN == 0)
        right += int(mx.all(hits, axis=1).sum().item())
    return 100 * right / len(rows)
