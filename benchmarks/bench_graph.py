"""What a GPU would be given for one token, ours beside mlx-lm's: kernels, bytes and Python's time. No GPU is needed.

    python benchmarks/bench_graph.py [--cases dense,codes,...] [--repeat 60] [--json FILE]

    dense, codes, adapter, codes+adapter   one token of one row, 56 layers, bfloat16; ours through the decoder that
                                           `stream_generate` uses, compiled; codes are balanced 2-bit (mlx-lm: affine)
    prefill                                512 tokens of a prompt, up to the logits of the next one
    train                                  loss and gradients of 512 tokens, LoRA of rank 32 on all projections,
                                           uncompiled on both sides; mlx-lm's without checkpointing

A ratio is ours / mlx-lm. `launches` are nodes of MLX's graph that are no views, counted by `gpu_graph.py` (beside the
checkout in `../shared/reference`, or where MLX_AFM_SHARED is); what `mx.compile` fused is one. `Copy`, which gradients
make, is a view too: it shares its input's memory. `bytes` are those of inputs and outputs of these nodes, each read and
written once, chains of elementwise operations fused on both sides, an update of a cache in place (ours reads the whole
room of its keys and values, 256 tokens, mlx-lm 9); `needed_bytes` are weights, the adapter in 16 bits, keys and values,
and `bytes_over_needed` is ours. `python_ms` is the time of the calling thread until the graph is made (`wall_ms` by
the clock), medians of interleaved runs with the collector off. As on a GPU, each of MLX's fused operations is one node
there; with what they fall apart into on the CPU mlx-lm's time is `mlx_lm_python_ms_on_cpu`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from measured import described
from mlx.utils import tree_flatten

from mlx_afm.adapters import LoRAConfig, add_adapter
from mlx_afm.data import Tokens, make_batch
from mlx_afm.generation.batch_cache import BatchCache
from mlx_afm.generation.decode import Decoder
from mlx_afm.generation.forms import decoder_of
from mlx_afm.model import AFMConfig, Model, backend
from mlx_afm.training.step import batch_loss

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "graph.json"
SHARED = Path(os.environ.get("MLX_AFM_SHARED", HERE.parents[1] / "shared"))
sys.path.insert(0, str(SHARED / "reference"))
try:
    import gpu_graph
except ImportError:
    raise SystemExit(f"{SHARED / 'reference' / 'gpu_graph.py'} is missing: set MLX_AFM_SHARED") from None

TOKEN_CASES = ("dense", "codes", "adapter", "codes+adapter")
CASES = (*TOKEN_CASES, "prefill", "train")
RANK, KNOWN_TOKENS, PROMPT_TOKENS = 32, 8, 512
SWITCH = [(backend, "on_cpu")]
VIEWS = gpu_graph.VIEWS | {"Copy"}
IN_PLACE = {"ScatterAxis", "SliceUpdate"}  # write their updates only; a cache is donated
ELEMENTWISE = {
    "Add",
    "AsType",
    "Divide",
    "Maximum",
    "Minimum",
    "Multiply",
    "Negative",
    "Round",
    "Sigmoid",
    "Subtract",
    "Select",
}
PICKING = {"Gather", "GatherAxis"}  # read what they give

Step = Callable[..., mx.array]


def our_model(case: str) -> Model:
    model = Model(AFMConfig(**gpu_graph.SIZES))
    model.set_dtype(mx.bfloat16)
    if "codes" in case:
        scheme = {"mode": "balanced", "bits": 2, "group_size": 64}
        nn.quantize(model, class_predicate=lambda _, module: hasattr(module, "to_quantized") and scheme)
    if "adapter" in case:
        add_adapter(model, LoRAConfig(rank=RANK))
    model.eval()
    mx.eval(model.parameters())
    return model


class OurStep:
    """The decode step of one row, as the engine calls it."""

    def __init__(self, model: Model) -> None:
        with gpu_graph.as_on_gpu(SWITCH):
            held = decoder_of(model)
            self.decoder: Decoder = held.decoder
            self.routes: Any = held.route
            prompt = model.make_cache()
            self.decoder.prefill(mx.zeros((1, KNOWN_TOKENS), mx.int32), prompt, self.routes)
            self.cache: BatchCache = self.decoder.new_cache()
            self.cache.append(prompt, KNOWN_TOKENS)
            mx.eval(self.cache.keys, self.cache.values)
        assert self.decoder.compiled
        self.storage = [*self.cache.keys, *self.cache.values]
        self.token = mx.zeros((1, 1), mx.int32)
        mx.eval(self.token)

    def __call__(self, *storage: mx.array) -> mx.array:
        """The next token behind the same keys and values each time."""
        self.put(storage or self.storage)
        logits = self.decoder.step(self.token, self.cache, self.routes, steps_done=self.decoder.plain_steps)
        return mx.argmax(logits[:, -1], axis=-1)

    def put(self, storage: Sequence[mx.array]) -> None:
        half = len(storage) // 2
        self.cache.keys, self.cache.values = list(storage[:half]), list(storage[half:])

    def outputs(self) -> list[mx.array]:
        """Everything that a step computes."""
        return [self(), *self.cache.keys, *self.cache.values]

    def reset(self) -> None:
        self.put(self.storage)


class TheirStep:
    """mlx-lm's step."""

    def __init__(self, case: str) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self.model, self.token = gpu_graph.peer_model(case), mx.zeros((1, 1), mx.int32)
        self.cache = make_prompt_cache(self.model)
        mx.eval(self.model(mx.zeros((1, KNOWN_TOKENS), mx.int32), cache=self.cache))
        mx.eval([layer.state for layer in self.cache], self.token)
        self.storage = [array for layer in self.cache for array in (layer.keys, layer.values)]
        self.offset = self.cache[0].offset

    def __call__(self, *storage: mx.array) -> mx.array:
        self.put(storage or self.storage)
        return mx.argmax(self.model(self.token, cache=self.cache)[:, -1], axis=-1)

    def put(self, storage: Sequence[mx.array]) -> None:
        for number, layer in enumerate(self.cache):
            layer.keys, layer.values = storage[2 * number : 2 * number + 2]
            layer.offset = self.offset

    def outputs(self) -> list[mx.array]:
        return [self(), *(array for layer in self.cache for array in (layer.keys, layer.values))]

    def reset(self) -> None:
        self.put(self.storage)


def launches(outputs: Sequence[mx.array]) -> dict[str, int]:
    """Nodes that launch a kernel, by name."""
    return {name: count for name, count in gpu_graph.kernels(*outputs).items() if name not in VIEWS}


def moved_bytes(function: Step, *arguments: mx.array) -> int:
    """Bytes that the nodes of a function's graph read and write; see the top of the file."""
    sizes: dict[str, int] = {}
    events: list[dict] = []

    def size(array: Sequence[Any]) -> int:
        name, shape, dtype = array
        return min(sizes.get(name, 1 << 60), int(np.prod(shape, dtype=np.int64)) * dtype.size)

    def visit(event: dict) -> None:
        if event["type"] == "constants":
            sizes.update({name: array.nbytes for name, array in event["constants"]})
        if event["type"] == "primitive":
            events.append(event)

    mx.disable_compile()  # fused nodes cannot be exported
    try:
        mx.export_function(visit, function, *arguments)
    finally:
        mx.enable_compile()
    fused = {array[0] for event in events if event["name"] in ELEMENTWISE for array in event["outputs"]}
    kept = {array[0] for event in events if event["name"] not in ELEMENTWISE for array in event["inputs"]}
    moved = 0
    for event in events:
        inputs, outputs, name = event["inputs"], event["outputs"], event["name"]
        if name in VIEWS:  # no larger than what they show
            sizes.update({array[0]: size(inputs[0]) for array in outputs if inputs})
            moved += sum(map(size, inputs[1:])) if name == "Depends" else 0  # what the stand-ins read besides
        elif name in IN_PLACE:
            moved += 2 * size(inputs[-1])
        elif name in PICKING:
            moved += 2 * sum(map(size, outputs))
        elif name in ELEMENTWISE:
            moved += sum(size(array) for array in inputs if array[0] not in fused)
            moved += sum(size(array) for array in outputs if array[0] in kept)
        else:
            moved += sum(map(size, [*inputs, *outputs]))
    return moved


@contextlib.contextmanager
def one_node_each() -> Iterator[None]:
    """MLX's fused operations as one node each that is made as quickly as theirs; only the time of making is of use."""
    fast, kept = (
        mx.fast,
        {name: getattr(mx.fast, name) for name in ("rms_norm", "rope", "scaled_dot_product_attention")},
    )
    asked = backend.on_cpu
    fast.rms_norm = lambda x, weight, eps: mx.softmax(x, -1)
    fast.rope = lambda x, *_, **__: mx.cumsum(x, axis=-1)
    fast.scaled_dot_product_attention = lambda q, k, v, **_: mx.sort(q, axis=-1)
    backend.on_cpu = lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        backend.on_cpu = asked  # type: ignore[assignment]
        for name, function in kept.items():
            setattr(fast, name, function)


def times(ours: OurStep, theirs: TheirStep, repeat: int) -> dict[str, float]:
    """Milliseconds until the graph of a token is there: medians of interleaved runs."""
    thread: dict[str, list[float]] = {"ours": [], "theirs": [], "on_cpu": []}
    wall: dict[str, list[float]] = {"ours": [], "theirs": [], "on_cpu": []}

    def run(name: str, step: OurStep | TheirStep) -> None:
        step.reset()
        started, worked = time.perf_counter(), time.thread_time()
        token = step()
        thread[name].append(1e3 * (time.thread_time() - worked))
        wall[name].append(1e3 * (time.perf_counter() - started))
        del token
        step.reset()

    ours.decoder._functions.clear()  # traced anew over these operations
    gc.collect()
    gc.disable()
    with one_node_each():
        for step in (ours, theirs):
            step()
        for _ in range(repeat):
            run("theirs", theirs)
            run("ours", ours)
    for _ in range(repeat // 2):
        run("on_cpu", theirs)
    gc.enable()
    middle = {name: statistics.median(values) for name, values in thread.items()}
    clock = {name: statistics.median(values) for name, values in wall.items()}
    return {
        "python_ratio": middle["ours"] / middle["theirs"],
        "wall_ratio": clock["ours"] / clock["theirs"],
        "python_ms": middle["ours"],
        "mlx_lm_python_ms": middle["theirs"],
        "wall_ms": clock["ours"],
        "mlx_lm_wall_ms": clock["theirs"],
        "mlx_lm_python_ms_on_cpu": middle["on_cpu"],
        "python_ratio_to_mlx_lm_on_cpu": middle["ours"] / middle["on_cpu"],
    }


def needed_bytes(model: Model, storage: Sequence[mx.array]) -> int:
    """Weights, adapter in 16 bits, keys and values: what no step can do without. Of the embedding, the head's use."""
    named = tree_flatten(model.parameters())
    adapter = sum(2 * array.size for name, array in named if name.endswith(("lora_a", "lora_b")))
    weights = sum(array.nbytes for name, array in named if not name.endswith(("lora_a", "lora_b")))
    reused = model.args.num_kv_reuse_layers * (storage[-1].nbytes * 2)  # read again by each layer that reuses them
    return adapter + weights + sum(array.nbytes for array in storage) + reused


def compared(ours: dict[str, int], theirs: dict[str, int]) -> dict[str, Any]:
    counts = sum(ours.values()), sum(theirs.values())
    return {
        "launch_ratio": counts[0] / counts[1],
        "launches": counts[0],
        "mlx_lm_launches": counts[1],
        "by_name": dict(sorted(ours.items(), key=lambda item: -item[1])[:12]),
    }


def token_case(case: str, repeat: int) -> dict[str, Any]:
    """One token of one row."""
    model, theirs = our_model(case), TheirStep(case)
    ours = OurStep(model)
    with gpu_graph.as_on_gpu(SWITCH):
        counted = compared(launches(ours.outputs()), launches(theirs.outputs()))
        ours.reset(), theirs.reset()
        moved, their_moved = moved_bytes(ours, *ours.storage), moved_bytes(theirs, *theirs.storage)
        ours.reset(), theirs.reset()
    needed = needed_bytes(model, ours.storage)
    return {
        **counted,
        **times(ours, theirs, repeat),
        "bytes_ratio": moved / their_moved,
        "bytes": moved,
        "mlx_lm_bytes": their_moved,
        "needed_bytes": needed,
        "bytes_over_needed": moved / needed,
    }


def prefill() -> dict[str, Any]:
    """The prompt's logits of one row, dense."""
    from mlx_lm.models.cache import make_prompt_cache

    model, peer = our_model("dense"), gpu_graph.peer_model("dense")
    tokens = mx.zeros((1, PROMPT_TOKENS), mx.int32)
    with gpu_graph.as_on_gpu(SWITCH):
        held, caches, theirs = decoder_of(model), model.make_cache(), make_prompt_cache(peer)
        logits = held.decoder.prefill(tokens, caches, held.route)
        assert logits is not None
        ours = launches([logits, *(array for cache in caches for array in (cache.keys, cache.values))])
        their_logits = peer(tokens, cache=theirs)[:, -1]
        return compared(ours, launches([their_logits, *(a for c in theirs for a in (c.keys, c.values))]))


def train() -> dict[str, Any]:
    """Loss and gradients of one row, LoRA."""
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, peer = our_model("adapter"), gpu_graph.peer_model("dense")
    peer.freeze()
    linear_to_lora_layers(peer, gpu_graph.SIZES["num_layers"], {"rank": RANK, "scale": 0.5, "dropout": 0.0})
    mx.eval(peer.parameters())
    model.train(), peer.train()
    ids = np.arange(PROMPT_TOKENS + 1) % gpu_graph.SIZES["vocab_size"]
    batch = make_batch([Tokens(ids, np.ones(len(ids), np.float32), "row")])
    with gpu_graph.as_on_gpu(SWITCH):
        loss, gradients = nn.value_and_grad(model, batch_loss)(model, batch, False)
        ours = launches([loss, *(array for _, array in tree_flatten(gradients))])
        span = mx.array([[0, len(ids)]])
        (loss, _), gradients = nn.value_and_grad(peer, default_loss)(peer, mx.array(ids[None]), span)
        theirs = launches([loss, *(array for _, array in tree_flatten(gradients))])
    products = [sum(counts.get(name, 0) for name in ("Matmul", "AddMM")) for counts in (ours, theirs)]
    return {
        **compared(ours, theirs),
        "product_ratio": products[0] / products[1],
        "products": products[0],
        "mlx_lm_products": products[1],
        "casts": ours.get("AsType", 0),
        "mlx_lm_casts": theirs.get("AsType", 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--repeat", type=int, default=60, help="timed runs of each side")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    if unknown := set(args.cases.split(",")) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    cases: dict[str, dict] = {}
    for case in args.cases.split(","):
        cases[case] = {"prefill": prefill, "train": train}[case]() if case not in TOKEN_CASES else {}
        cases[case] |= token_case(case, args.repeat) if case in TOKEN_CASES else {}
        facts = {name: value for name, value in cases[case].items() if not isinstance(value, dict)}
        print(case, ", ".join(f"{n} {v:.3f}" if isinstance(v, float) else f"{n} {v}" for n, v in facts.items()))
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps({"cases": cases, **described("mlx", "mlx-lm", "numpy")}, indent=2) + "\n")


if __name__ == "__main__":
    main()
