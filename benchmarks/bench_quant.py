"""Decoding, prefill and a QLoRA step of every kind of codes beside the dense model, in one run.

    python benchmarks/bench_quant.py [--width 1024] [--prompt 128] [--repeat 5] [--forms apple,affine-4] [--json FILE]
    python benchmarks/bench_quant.py --width 2048 --forms apple,affine-4 --json FILE    # layers of the real width

Random weights, float32, 4 + 2 layers, vocabulary 16,384; times are medians of interleaved runs. A case is
TASK_FORM; a ratio is codes / dense: `time_ratio` of the task, `memory_ratio` of the weights that are held. Decoding is
8 tokens. Dense matrices lie as `generate` has them.
`decode_kv8_...` decodes with the int8 cache beside the same model with the usual one, and its `memory_ratio` is
that of the caches (float32: a quarter).

The BLAS in MLX's CPU wheel is slow, so OpenBLAS is preloaded if it is found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from measured import described, with_openblas
from mlx.utils import tree_flatten, tree_map

from mlx_afm.adapters import LoRAConfig, add_adapter
from mlx_afm.model import AFMConfig, Model
from mlx_afm.model.cpu.layout import lay_out_for_decoding
from mlx_afm.quant import QuantConfig, plan_schemes

RESULTS = Path(__file__).resolve().parent / "results" / "quant.json"
FORMS = {
    "apple": {"recipe": "apple"},
    "affine-2": {"bits": 2},
    "affine-4": {"bits": 4},
    "affine-8": {"bits": 8},
    "mxfp4": {"mode": "mxfp4"},
    "nvfp4": {"mode": "nvfp4"},
    "mxfp8": {"mode": "mxfp8"},
}
DECODED = 8
TRAINED = 32


def dense_model(width: int) -> Model:
    mx.random.seed(0)
    config = AFMConfig(vocab_size=16384, hidden_dim=width, num_layers=6, num_kv_reuse_layers=2, num_heads=width // 128)
    model = Model(config)
    model.eval()
    mx.eval(model.parameters())
    lay_out_for_decoding(model)
    return model


def in_codes(dense: Model, form: str) -> Model:
    model = Model(dense.args)
    model.update(dense.parameters())
    shapes = {
        name.removesuffix(".weight"): array.shape
        for name, array in tree_flatten(dense.parameters())
        if name.endswith(".weight") and array.ndim == 2
    }
    schemes = plan_schemes(QuantConfig(**FORMS[form]), shapes).schemes
    nn.quantize(model, class_predicate=lambda path, _: schemes[path].to_dict() if path in schemes else False)
    model.eval()
    mx.eval(model.parameters())
    return model


def weight_bytes(model: Model) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def tokens(count: int) -> mx.array:
    return mx.array(np.random.default_rng(0).integers(1, 16384, (1, count)).astype(np.int32))


def seconds(action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def prefill(model: Model, prompt: mx.array) -> None:
    last = mx.array([[prompt.shape[1] - 1]])
    mx.eval(model.logits(model.hidden(prompt, cache=model.make_cache(), output_positions=last)))


def decode(model: Model, cache: list, prompt: mx.array) -> None:
    token = prompt[:, :1]
    for _ in range(DECODED):
        token = mx.argmax(model(token, cache=cache), axis=-1)
        mx.eval(token)
    for layer in cache:
        layer.trim(DECODED)


def filled(model: Model, prompt: mx.array, *, quantized: bool = False) -> list:
    cache = model.make_cache(quantized=quantized)
    mx.eval(model(prompt, cache=cache)[:, -1])
    return cache


def train_step(model: Model, prompt: mx.array) -> None:
    def loss(model: Model) -> mx.array:
        return nn.losses.cross_entropy(model(prompt[:, :-1]), prompt[:, 1:], reduction="mean")

    mx.eval(nn.value_and_grad(model, loss)(model))


def adapted(model: Model) -> Model:
    model.train()
    add_adapter(model, LoRAConfig(rank=16))
    mx.eval(model.parameters())
    return model


def interleaved(actions: list[Callable[[], None]], repeat: int) -> list[float]:
    for action in actions:
        action()
    runs = [[seconds(action) for action in actions] for _ in range(repeat)]
    return [statistics.median(times) for times in zip(*runs, strict=True)]


def measure(form: str, dense: Model, prompt_tokens: int, repeat: int) -> dict[str, dict[str, float]]:
    codes, prompt = in_codes(dense, form), tokens(prompt_tokens)
    memory = weight_bytes(codes) / weight_bytes(dense)
    pair = (codes, dense)
    caches = [filled(model, prompt) for model in pair]
    small = filled(codes, prompt, quantized=True)
    cases = {}

    def add(name: str, actions: list[Callable[[], None]], memory_ratio: float) -> None:
        ours, other = interleaved(actions, repeat)
        cases[f"{name}_{form}"] = {
            "time_ratio": round(ours / other, 4),
            "memory_ratio": round(memory_ratio, 4),
            "seconds": round(ours, 5),
            "other_seconds": round(other, 5),
        }
        print(f"{name}_{form}: {cases[f'{name}_{form}']}", file=sys.stderr, flush=True)

    add("prefill", [lambda model=model: prefill(model, prompt) for model in pair], memory)
    add("decode", [lambda m=model, c=cache: decode(m, c, prompt) for model, cache in zip(pair, caches)], memory)
    ratio = sum(layer.nbytes for layer in small) / sum(layer.nbytes for layer in caches[0])
    add("decode_kv8", [lambda: decode(codes, small, prompt), lambda: decode(codes, caches[0], prompt)], ratio)
    twin = Model(dense.args)
    twin.update(tree_map(lambda array: array, dense.parameters()))
    trained = [adapted(model) for model in (codes, twin)]
    add("train", [lambda model=model: train_step(model, prompt[:, : TRAINED + 1]) for model in trained], memory)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    blas, cases = with_openblas(), {}
    dense = dense_model(options.width)
    for form in options.forms.split(","):
        cases.update(measure(form, dense, options.prompt, options.repeat))
    settings = {
        "width": dense.args.hidden_dim,
        "layers": dense.args.num_layers,
        "prompt_tokens": options.prompt,
        "repeat": options.repeat,
        "blas": blas,
    }
    found = {"cases": cases, "settings": settings, **described("mlx-afm", "mlx", "numpy")}
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
