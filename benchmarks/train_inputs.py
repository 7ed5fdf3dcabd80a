"""What bench_train.py gives to both sides: random weights by names they share, and tokenised lines of the data."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_afm.model import AFMConfig, Model
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.workflows.demo import ASSETS

ROWS, ROW_TOKENS, TRAINED_SHARE = 4, 256, 0.25
RANK, SCALE = 16, 0.5
SYSTEM_TOKENS = 300


def write_weights(sizes: dict, folder: Path) -> dict:
    """Random weights by names that both sides have; the configuration."""
    config = {**sizes, "num_heads": sizes["hidden_dim"] // 128, "num_kv_heads": 2}
    mx.random.seed(0)
    model = Model(AFMConfig(**config))
    for layer in model.model.layers:
        layer.self_attn.quant_key_scale = layer.self_attn.quant_value_scale = mx.array(0.03)
    path = folder / f"{config['hidden_dim']}-{config['num_layers']}-{config['vocab_size']}.safetensors"
    if not path.exists():
        mx.save_safetensors(str(path), dict(tree_flatten(model.parameters())))
    return {"config": config, "weights": str(path), "rank": RANK, "scale": SCALE}


def tokenized(data: Path, count: int, system: str | None = None) -> list[tuple[list[int], int]]:
    """Ids of each line, and the index of the first token of the answer."""
    tokenizer = AFMTokenizer.from_file(ASSETS / "tokenizer.model")
    rows = []
    with data.open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(count)):
            first, *others = json.loads(line)
            messages = [{**first, "content": system or first["content"]}, *others]
            prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
            rows.append((tokenizer.apply_chat_template(messages), len(prompt)))
    return rows


def turn_end_id() -> int:
    return AFMTokenizer.from_file(ASSETS / "tokenizer.model").turn_end_id


def system_prompt(data: Path) -> str:
    """Sentences of the data, until the system turn has 300 tokens."""
    text, lines = "Answer with one shell command.", iter(data.read_text(encoding="utf-8").splitlines())
    while len(tokenized(data, 1, text)[0][0]) < SYSTEM_TOKENS + 25:
        text += " " + json.loads(next(lines))[1]["content"]
    return text


def write_rows(rows: list[tuple[list[int], int]], path: Path) -> str:
    ids = np.concatenate([np.array(row, np.int32) for row, _ in rows])
    np.savez(path, ids=ids, lengths=[len(row) for row, _ in rows], first_trained=[first for _, first in rows])
    return str(path)


def fixed_rows(data: Path, path: Path) -> str:
    """Rows of equal length cut from the data, the last quarter trained."""
    ids = [token for row, _ in tokenized(data, 60) for token in row]
    width, first = ROW_TOKENS + 1, ROW_TOKENS + 1 - round(TRAINED_SHARE * ROW_TOKENS)
    return write_rows([(ids[width * index : width * (index + 1)], first) for index in range(ROWS)], path)
