"""The two sides of bench_train.py, each alone in a process: it loads weights, then obeys lines on stdin.

                                        ->  {"steps": 40, "warm_up": [0, 7]}   of its own accord
    {"do": "run", "steps": [0, 1, 2]}   ->  {"seconds": [...], "cpu_seconds": [...], "losses": [...]}
    {"do": "peak"}                      ->  {"mlx_peak_bytes": ...}, and counts anew

A side is a list of steps, and which of them to run before timing: one of each shape if it compiles. mlx-lm's are
those of its `train`: `default_loss`, compiled with its state, its own batches, the cache cleared after every step as
its default has it. In float32 it needs no repair for this; that its key and value adapters get no gradient, and that
it trains one padding token a row, is left as it is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np

Step = Callable[[], float]  # runs one optimizer step, returns its loss


def read_rows(path: str) -> list[tuple[np.ndarray, int]]:
    """Token ids of every example, and the index of its first trained token."""
    held = np.load(path)
    parts = np.split(held["ids"], np.cumsum(held["lengths"])[:-1])
    return list(zip(parts, held["first_trained"].tolist()))


def ours(spec: dict) -> tuple[list[Step], list[int]]:
    from mlx_afm.adapters import LoRAConfig, add_adapter
    from mlx_afm.data import Tokens, find_prefixes, make_batch, plan_packed
    from mlx_afm.model import AFMConfig, Model
    from mlx_afm.training.step import train_step

    model = Model(AFMConfig(**spec["config"]))
    model.load_weights(spec["weights"])
    mx.eval(model.parameters())
    add_adapter(model, LoRAConfig(rank=spec["rank"], scale=spec["scale"]))
    model.train()
    optimizer = optimizers.Adam(learning_rate=1e-4)
    data = []
    for number, (ids, first) in enumerate(read_rows(spec["rows"]), 1):
        weights = (np.arange(len(ids)) >= first).astype(np.float32)
        data.append(Tokens(ids, weights, f"line {number}"))

    def step(indices: Sequence[int]) -> float:
        batch = make_batch([data[index] for index in indices])
        result = train_step(model, optimizer, [batch], clip_norm=1.0)
        return result.loss / result.tokens

    batching = spec["batching"]
    if "rows" in batching:
        plan = [tuple(range(batching["rows"]))]
    else:
        plan = plan_packed(find_prefixes(data), batching["batch_tokens"], seed=0, epoch=0)
    return [partial(step, indices) for indices in plan], [0]


def ours_frozen(spec: dict) -> tuple[list[Step], list[int]]:
    """The last layers only, over a store of what those below give; steps of all epochs."""
    from mlx_afm.adapters import LoRAConfig, add_adapter
    from mlx_afm.data import Tokens, plan_batches
    from mlx_afm.model import AFMConfig, Model
    from mlx_afm.runs.activation_store import DiskStore
    from mlx_afm.training.frozen import FrozenLayers, first_trained_layer
    from mlx_afm.training.step import train_step

    def load() -> Model:  # weights are read when they are used
        model = Model(AFMConfig(**spec["config"]))
        model.load_weights(spec["weights"])
        model.eval()
        return model

    model = load()
    add_adapter(model, LoRAConfig(rank=spec["rank"], scale=spec["scale"], layers=f"last-{spec['num_layers']}"))
    mx.eval(model.trainable_parameters())
    model.train()
    optimizer = optimizers.Adam(learning_rate=1e-4)
    data = []
    for number, (ids, first) in enumerate(read_rows(spec["rows"]), 1):
        weights = (np.arange(len(ids)) >= first).astype(np.float32)
        data.append(Tokens(ids, weights, f"line {number}"))
    store = DiskStore(Path(spec["store"]), {"weights": spec["weights"]}, 1 << 40, print)
    frozen = FrozenLayers(model.args, first_trained_layer(model), load, store, prefix_end_id=spec["prefix_end_id"])
    frozen.expect(data)
    lengths = [len(row) for row in data]

    def step(indices: Sequence[int]) -> float:
        batch = frozen.make_batch([data[index] for index in indices])
        result = train_step(model, optimizer, [batch], clip_norm=1.0)
        return result.loss / result.tokens

    plans = [
        plan_batches(lengths, spec["batching"]["batch_size"], seed=0, epoch=epoch) for epoch in range(spec["epochs"])
    ]
    return [partial(step, indices) for plan in plans for indices in plan], []


def mlx_lm(spec: dict) -> tuple[list[Step], list[int]]:
    import mlx.nn as nn
    from mlx_lm.models import afm7
    from mlx_lm.tuner.trainer import default_loss, iterate_batches
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = afm7.Model(afm7.ModelArgs(model_type="afm7", **spec["config"]))
    model.load_weights(spec["weights"])
    mx.eval(model.parameters())
    model.freeze()
    linear_to_lora_layers(
        model, spec.get("num_layers", len(model.layers)), {"rank": spec["rank"], "scale": spec["scale"], "dropout": 0.0}
    )
    model.train()
    optimizer = optimizers.Adam(learning_rate=1e-4)
    loss_and_grad = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def compiled(batch: mx.array, lengths: mx.array) -> mx.array:
        (loss, _), gradients = loss_and_grad(model, batch, lengths)
        optimizer.update(model, gradients)
        return loss

    rows = [(ids.tolist(), first) for ids, first in read_rows(spec["rows"])]
    batching = spec["batching"]
    if "rows" in batching:
        rows = rows[: batching["rows"]]
        lengths = [[first, len(ids) - 1] for ids, first in rows]
        batches = [(mx.array([ids for ids, _ in rows]), mx.array(lengths))]
    else:
        batches = list(iterate_batches(rows, batching["batch_size"], max_seq_length=2048, seed=0))

    def step(batch: tuple[mx.array, mx.array]) -> float:
        loss = compiled(*batch)
        mx.eval(state, loss)
        if mx.get_cache_memory() > 0:
            mx.clear_cache()
        return loss.item()

    batches = batches * spec.get("epochs", 1)
    shapes = {batch.shape: index for index, (batch, _) in enumerate(batches)}
    return [partial(step, batch) for batch in batches], sorted(shapes.values())


def timed(step: Step) -> tuple[float, float, float]:
    """Seconds on the clock and of all threads, and the loss."""
    started, worked = time.perf_counter(), time.process_time()
    loss = step()
    return time.perf_counter() - started, time.process_time() - worked, loss


def main() -> None:
    spec = json.loads(sys.argv[1])
    steps, warm_up = {"ours": ours_frozen if "store" in spec else ours, "mlx-lm": mlx_lm}[spec["side"]](spec)
    mx.reset_peak_memory()
    print(json.dumps({"steps": len(steps), "warm_up": warm_up}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "peak":
            answer: dict = {"mlx_peak_bytes": mx.get_peak_memory()}
            mx.reset_peak_memory()
        else:
            done = [timed(steps[index]) for index in order["steps"]]
            answer = dict(zip(("seconds", "cpu_seconds", "losses"), map(list, zip(*done))))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
