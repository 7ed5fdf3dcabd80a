"""Ours beside mlx-lm on a GPU, at the real model's size, with random weights in bfloat16.

    python benchmarks/bench_gpu.py [--cases dense,2-bit,...] [--tokens 128] [--json FILE]

    dense, 4-bit, 2-bit, adapter, 2-bit+adapter   seconds to the first token of an answer to 512 tokens, then seconds a
                                                  token; ours balanced in 2-bit, mlx-lm's affine; adapters of rank 32 on
                                                  all projections
    rows_8                                        tokens a second of 8 rows in one batch, 4 adapters mixed, 2-bit;
                                                  beside our own one after the other
    train, train_2-bit                            an optimizer step of 4 x 512 tokens, a quarter of them trained, LoRA
                                                  of rank 32 on all projections, every layer checkpointed; mlx-lm's
                                                  compiled as its `train` does
    operations                                    microseconds of single operations on the device, to explain the others

Both sides lie in one process and run in turns; times are medians. `python_ms` is the time of the calling thread for a
token. A ratio is ours / mlx-lm. `../shared/reference/gpu_graph.py` (or MLX_AFM_SHARED) holds mlx-lm's model with the
repairs that let it quantize.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from bench_graph import RANK, gpu_graph
from measured import commit, described
from mlx.utils import tree_flatten

from mlx_afm.adapters import LoRAConfig, add_adapter
from mlx_afm.data import Tokens, make_batch
from mlx_afm.generation import GenerateConfig
from mlx_afm.generation.engine import Engine, Request
from mlx_afm.generation.forms import decoder_of
from mlx_afm.model import AFMConfig, Model
from mlx_afm.training.step import train_step

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
TOKEN_CASES = ("dense", "4-bit", "2-bit", "adapter", "2-bit+adapter")
TRAIN_CASES = ("train", "train_2-bit")
CASES = (*TOKEN_CASES, "rows_8", *TRAIN_CASES, "operations")
PROMPT_TOKENS, ROWS, STEPS = 512, 4, 5
SIZES = {
    "vocab_size": 153600,
    "hidden_dim": 2048,
    "num_layers": 56,
    "num_kv_reuse_layers": 21,
    "num_heads": 16,
    "num_kv_heads": 2,
}

Answer = Iterator[int]


def bits_of(case: str) -> int:
    return 2 if "2-bit" in case else 4 if "4-bit" in case else 0


def our_model(case: str) -> Model:
    model = Model(AFMConfig(**SIZES))
    model.set_dtype(mx.bfloat16)
    if bits := bits_of(case):
        scheme = {"mode": "balanced" if bits == 2 else "affine", "bits": bits, "group_size": 64}
        with mx.stream(mx.cpu):  # MLX 0.32.4 fails to quantize the embedding on CUDA
            nn.quantize(model, class_predicate=lambda _, module: hasattr(module, "to_quantized") and scheme)
            mx.eval(model.parameters())
    if "adapter" in case or "train" in case:
        add_adapter(model, LoRAConfig(rank=RANK))
    model.eval()
    mx.eval(model.parameters())
    return model


def their_model(case: str) -> Any:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    gpu_graph.SIZES.update(SIZES)
    model = gpu_graph.peer_model("dense")
    if bits := bits_of(case):
        with mx.stream(mx.cpu):
            nn.quantize(model, 64, bits)
            mx.eval(model.parameters())
    if "adapter" in case or "train" in case:
        model.freeze()
        linear_to_lora_layers(model, SIZES["num_layers"], {"rank": RANK, "scale": 0.5, "dropout": 0.0})
    model.eval()
    mx.eval(model.parameters())
    return model


def prompt_ids(seed: int = 0, count: int = PROMPT_TOKENS) -> list[int]:
    return np.random.default_rng(seed).integers(1, SIZES["vocab_size"], count).tolist()


def our_tokens(model: Model, count: int) -> Answer:
    held = decoder_of(model)
    engine = Engine(held.decoder, routes=held.routes)
    engine.add(Request(ids=prompt_ids(), config=GenerateConfig(max_tokens=count, temp=0.0), max_tokens=count))
    while engine.busy:
        for event in engine.step():
            yield event.token.token


def their_tokens(model: Any, count: int) -> Answer:
    from mlx_lm.generate import generate_step

    for token, _ in generate_step(mx.array(prompt_ids()), model, max_tokens=count):
        yield token


def answer_times(tokens: Answer, count: int) -> dict[str, float]:
    mx.synchronize()
    started = time.perf_counter()
    next(tokens)
    first = time.perf_counter()
    worked = time.thread_time()
    number = 1
    for _ in tokens:
        number += 1
    seconds, worked = time.perf_counter() - first, time.thread_time() - worked
    mx.synchronize()
    assert number == count, (number, count)
    return {
        "first_token_ms": 1e3 * (first - started),
        "token_ms": 1e3 * seconds / (count - 1),
        "python_ms": 1e3 * worked / (count - 1),
    }


def in_turns(sides: dict[str, Callable[[], dict[str, float]]], repeat: int) -> dict[str, Any]:
    """Medians of each side after two warm-up runs, and the ratio of the first side to the second."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(repeat + 2):
        for name, side in sides.items():
            values = side()
            if turn > 1:
                runs[name].append(values)
    middle = {
        name: {key: statistics.median(run[key] for run in each) for key in each[0]} for name, each in runs.items()
    }
    first, second = list(middle.values())[:2]
    return {**middle, "ratio": {key: first[key] / second[key] for key in first if key in second}}


def token_case(case: str, count: int, repeat: int) -> dict[str, Any]:
    ours, theirs = our_model(case), their_model(case)
    return in_turns(
        {
            "ours": lambda: answer_times(our_tokens(ours, count), count),
            "mlx-lm": lambda: answer_times(their_tokens(theirs, count), count),
        },
        repeat,
    )


def rows_case(count: int, repeat: int) -> dict[str, Any]:
    from mlx_afm.adapters.inference import AdapterStacks

    model = our_model("2-bit")
    decoder = decoder_of(model).decoder
    stacks = AdapterStacks(decoder.form)
    donor = our_model("adapter")
    names = [f"adapter {n}" for n in range(4)]
    weights = dict(tree_flatten(donor.trainable_parameters()))
    for name in names:
        stacks.add(name, {n: (lambda array=array: array) for n, array in weights.items()}, LoRAConfig(rank=RANK).scale)
    del donor

    def answer(groups: list[list[int]]) -> dict[str, float]:
        mx.synchronize()
        started = time.perf_counter()
        for group in groups:
            engine = Engine(decoder, routes=stacks.routes)
            for n in group:
                config = GenerateConfig(max_tokens=count, temp=0.0)
                engine.add(
                    Request(ids=prompt_ids(n, 32), config=config, max_tokens=count, adapter=names[n % len(names)])
                )
            while engine.busy:
                engine.step()
        mx.synchronize()
        return {"tokens_per_second": 8 * count / (time.perf_counter() - started)}

    return in_turns(
        {"together": lambda: answer([list(range(8))]), "one_by_one": lambda: answer([[n] for n in range(8)])}, repeat
    )


def timed_steps(step: Callable[[], Any], repeat: int) -> dict[str, float]:
    """Medians of `repeat` steps after two that warm up."""
    runs = []
    for _ in range(repeat + 2):
        mx.synchronize()
        mx.reset_peak_memory()
        started = time.perf_counter()
        step()
        mx.synchronize()
        held = mx.get_active_memory()
        peak = (mx.get_peak_memory() - held) / 1e9
        runs.append({"step_ms": 1e3 * (time.perf_counter() - started), "peak_above_held_gb": peak})
    return {key: statistics.median(run[key] for run in runs[2:]) for key in runs[0]}


def training_rows() -> tuple[list[np.ndarray], int]:
    """Rows of token ids, and the index of the first trained token."""
    return [np.array(prompt_ids(n, PROMPT_TOKENS + 1)) for n in range(ROWS)], 3 * PROMPT_TOKENS // 4 + 1


def our_steps(case: str, repeat: int) -> dict[str, Any]:
    rows, first = training_rows()
    weights = (np.arange(PROMPT_TOKENS + 1) >= first).astype(np.float32)
    batch = make_batch([Tokens(ids, weights, "row") for ids in rows])
    model, optimizer = our_model(case), optimizers.Adam(learning_rate=1e-4)
    model.train()
    return {
        name: timed_steps(
            partial(train_step, model, optimizer, [batch], clip_norm=1.0, grad_checkpoint=checkpoint), repeat
        )
        for name, checkpoint in (("ours", True), ("ours_not_checkpointed", False))
    }


def their_steps(case: str, repeat: int) -> dict[str, Any]:
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint

    rows, first = training_rows()
    tokens, lengths = mx.array(np.stack(rows)), mx.array([[first, PROMPT_TOKENS]] * ROWS)
    model, optimizer = their_model(case), optimizers.Adam(learning_rate=1e-4)
    model.train()

    def step_of() -> Callable[[], None]:
        loss_and_grad = nn.value_and_grad(model, default_loss)
        state = [model.state, optimizer.state, mx.random.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def compiled(tokens: mx.array, lengths: mx.array) -> mx.array:
            (loss, _), gradients = loss_and_grad(model, tokens, lengths)
            optimizer.update(model, gradients)
            return loss

        return lambda: mx.eval(compiled(tokens, lengths), state)

    found = {"mlx-lm_not_checkpointed": timed_steps(step_of(), repeat)}
    grad_checkpoint(model.layers[0])
    return found | {"mlx-lm": timed_steps(step_of(), repeat)}


def train_case(case: str, repeat: int) -> dict[str, Any]:
    found = our_steps(case, repeat)
    gc.collect()
    mx.clear_cache()
    found |= their_steps(case, repeat)
    return found | {"ratio": {key: found["ours"][key] / found["mlx-lm"][key] for key in found["ours"]}}


def operations_case() -> dict[str, float]:
    """Microseconds of single operations, from 200 that wait for each other."""
    q = mx.random.normal((1, 16, 1, 128)).astype(mx.bfloat16)
    x = mx.random.normal((1, 1, 2048)).astype(mx.bfloat16)
    w = mx.random.normal((2048, 2048)).astype(mx.bfloat16)
    norm = mx.ones((2048,), mx.bfloat16)
    found: dict[str, float] = {}

    def measure(name: str, function: Callable[[mx.array], mx.array], start: mx.array, times: int = 200) -> None:
        try:
            values = []
            for _ in range(5):
                y = start
                mx.synchronize()
                began = time.perf_counter()
                for _ in range(times):
                    y = function(y)
                mx.eval(y)
                values.append(time.perf_counter() - began)
            found[name] = 1e6 * min(values) / times
        except Exception as error:
            found[name + " failed: " + str(error)[:80]] = 0.0

    for room in (640, 1024, 4096):
        k, v = (mx.random.normal((1, 2, room, 128)).astype(mx.bfloat16) for _ in range(2))
        mask = mx.arange(room)[None, None, None] < 600

        def attention(mask: mx.array | None, k: mx.array = k, v: mx.array = v) -> Callable[[mx.array], mx.array]:
            return lambda q: mx.fast.scaled_dot_product_attention(q, k, v, scale=128**-0.5, mask=mask)

        measure(f"attention {room}", attention(None), q)
        measure(f"attention {room}, mask", attention(mask), q)
        measure(f"attention {room}, additive mask", attention(mx.where(mask, 0.0, -1e9).astype(mx.bfloat16)), q)
    measure("rms_norm", lambda x: mx.fast.rms_norm(x, norm, 1e-5), x)
    measure("rms_norm without weight", lambda x: mx.fast.rms_norm(x, None, 1e-5), x)
    measure("product 2048 x 2048", lambda x: x @ w, x)
    for bits in (2, 4, 8):
        packed = mx.quantize(w.astype(mx.float32), 64, bits)
        packed = [array if array.dtype == mx.uint32 else array.astype(mx.bfloat16) for array in packed]
        for count in (1, 8, 512):
            rows = mx.random.normal((1, count, 2048)).astype(mx.bfloat16)
            measure(
                f"quantized product, {bits} bits, {count} rows",
                lambda x, packed=packed, bits=bits: mx.quantized_matmul(x, *packed, group_size=64, bits=bits),
                rows,
                50,
            )
    measure("add", lambda x: x + norm, x)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    cases: dict[str, Any] = {}
    for case in options.cases.split(","):
        began = time.perf_counter()
        try:
            if case in TOKEN_CASES:
                cases[case] = token_case(case, options.tokens, options.repeat)
            elif case == "rows_8":
                cases[case] = rows_case(options.tokens, options.repeat)
            elif case in TRAIN_CASES:
                cases[case] = train_case(case, options.repeat)
            else:
                cases[case] = operations_case()
        except Exception:
            cases[case] = {"failed": traceback.format_exc()[-1500:]}
        gc.collect()
        mx.clear_cache()
        print(case, f"{time.perf_counter() - began:.0f} s", json.dumps(cases[case], indent=1), flush=True)
        result = {"cases": cases, "commit": commit(), **described("mlx", "mlx-lm", "numpy")}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
