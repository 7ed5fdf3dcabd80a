"""Pretrains the demo's tiny AFM on the BASE dialect and writes it where the package carries it.

python tools/demo/make_data.py --corpus CORPUS --corpus-lines 150000
python tools/demo/pretrain.py --corpus CORPUS [--steps N]

All weights are trained. The ranges of the key and value quantizers are set wide at first, measured
after four fifths of the steps, and kept for the rest, so that the model has adjusted to them.

Preloading OpenBLAS makes this about ten times faster on Linux. Same machine, same options: same model.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten

from mlx_afm.checkpoints.arrays import cast, from_mlx
from mlx_afm.data import Tokens, make_batch, padded_batch, plan_batches, read_tokens
from mlx_afm.formats.safetensors_file import write_safetensors
from mlx_afm.model import AdapterSpec, AFMConfig, Model, ToolkitConfig, to_toolkit_config
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.training import TrainConfig, evaluate_data
from mlx_afm.training.schedule import learning_rate
from mlx_afm.training.step import train_step

ASSETS = Path(__file__).resolve().parents[2] / "mlx_afm" / "assets" / "demo"
SIZES = {
    "hidden_dim": 96,
    "num_layers": 6,
    "num_kv_reuse_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
}
ADAPTER = AdapterSpec(name="base_adapter", rank=32, alpha=16)
FIRST_RANGE = 8.0
READ_WEIGHT = 0.2


def set_quantizer_steps(model: Model, keys: list[float], values: list[float]) -> None:
    """Sets the step of each layer's quantizers from the largest absolute key and value."""
    for layer, key, value in zip(model.model.layers, keys, values):
        layer.self_attn.quant_key_scale = mx.array(key / 127, mx.float32)
        layer.self_attn.quant_value_scale = mx.array(value / 127, mx.float32)
        layer.self_attn.freeze(keys=["quant_key_scale", "quant_value_scale"], recurse=False)


def measured_ranges(model: Model, rows: list[Tokens]) -> tuple[list[float], list[float]]:
    """Largest absolute key and value of each layer on some examples."""
    caches = model.make_cache()
    model.hidden(padded_batch(rows).inputs_BL, cache=caches)
    sides = [[cache.keys, cache.values] for cache in caches]
    keys, values = ([mx.abs(array).max().item() for array in side] for side in zip(*sides))
    return keys, values


def load(folder: Path, name: str, tokenizer_file: Path) -> list[Tokens]:
    return list(read_tokens((folder / f"{name}.jsonl",), tokenizer_file))


def with_read_tokens(tokens: Tokens) -> Tokens:
    """The request counts a little too: predicting it teaches the model the language it must read."""
    return replace(tokens, weights=np.maximum(tokens.weights, np.float32(READ_WEIGHT)))


def pretrain(model: Model, train: list[Tokens], valid: list[Tokens], config: TrainConfig) -> None:
    optimizer = AdamW(
        learning_rate=config.learning_rate, betas=[0.9, 0.95], weight_decay=config.weight_decay, bias_correction=True
    )
    lengths = [len(tokens) for tokens in train]
    step, epoch, started, total = 0, 0, time.time(), config.iters or 0
    while step < total:
        for indices in plan_batches(lengths, config.batch_size, seed=config.seed, epoch=epoch):
            if step == total * 4 // 5:
                set_quantizer_steps(model, *measured_ranges(model, valid[:256]))
            optimizer.learning_rate = learning_rate(config, step, total)
            result = train_step(model, optimizer, [make_batch([train[i] for i in indices])], clip_norm=1.0)
            step += 1
            if step % 100 == 0:
                print(
                    f"step {step} loss {result.loss / result.tokens:.4f} {(time.time() - started) / step:.3f} s/step",
                    flush=True,
                )
            if step % config.steps_per_eval == 0 or step == total:
                loss, tokens = evaluate_data(model, valid, 64)
                print(f"step {step} valid {loss / tokens:.4f}", flush=True)
                write_assets(model)
            if step == total:
                break
        epoch += 1


def write_assets(model: Model) -> None:
    """Writes weights as float16 (quantizer steps as float32) and the toolkit's JSON."""
    tensors = {}
    for name, array in sorted(tree_flatten(model.parameters())):
        tensor = from_mlx(array)
        tensors[name] = tensor if name.endswith("_scale") else cast(tensor, "float16")
    write_safetensors(ASSETS / "base-model.safetensors", tensors)
    config = to_toolkit_config(ToolkitConfig(model=model.args, adapter=ADAPTER))
    (ASSETS / "base-model-config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = AFMTokenizer.from_file(ASSETS / "tokenizer.model")
    train, valid = (load(options.corpus, name, ASSETS / "tokenizer.model") for name in ("train", "valid"))
    train = [with_read_tokens(tokens) for tokens in train]
    print(f"{len(train)} examples, {np.mean([len(t) for t in train]):.1f} tokens each")
    mx.random.seed(options.seed)
    model = Model(AFMConfig(vocab_size=tokenizer.vocab_size, **SIZES))
    set_quantizer_steps(model, *([[FIRST_RANGE] * len(model.model.layers)] * 2))
    print(f"{sum(a.size for _, a in tree_flatten(model.parameters())):,} parameters")
    config = TrainConfig(
        iters=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup=0.02,
        steps_per_eval=250,
        seed=options.seed,
        weight_decay=0.05,
    )
    pretrain(model, train, valid, config)


if __name__ == "__main__":
    main()
