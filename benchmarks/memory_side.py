"""One setting of bench_memory.py, alone in a process: some training steps as `lora` does them, and MLX's peak.

python benchmarks/memory_side.py '{"config": {...}, "rows": 4, "tokens": 256, ...}'
    ->  {"mlx_peak_bytes": ..., "layout": {...}, "seconds": ...}
"""

from __future__ import annotations

import json
import sys
import time

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_afm.adapters import LoRAConfig, add_adapter
from mlx_afm.data import Batch, Tokens, make_batch
from mlx_afm.model import AFMConfig, Model
from mlx_afm.model.projections import quantize_module
from mlx_afm.quant import QuantConfig, plan_schemes
from mlx_afm.training import TrainConfig
from mlx_afm.training.optimizers import GroupedOptimizer
from mlx_afm.training.step import train_step

STEPS = 2  # the optimizer's state is there from the second on


def base_model(config: AFMConfig, base: str) -> Model:
    """Random weights in float32, bfloat16 or float16; in codes if the name goes on with a mode: bfloat16/affine4."""
    dtype, _, mode = base.partition("/")
    mx.random.seed(0)
    model = Model(config)
    model.apply(lambda array: array.astype(getattr(mx, dtype)) if array.ndim else mx.array(0.03))
    if mode:
        modules = {n: m for n, m in model.named_modules() if hasattr(m, "to_quantized") and "weight" in m}
        settings = QuantConfig(mode=mode[:-1], bits=int(mode[-1]))
        plan = plan_schemes(settings, {name: tuple(module.weight.shape) for name, module in modules.items()})
        coded = [(n, quantize_module(modules[n], s.group_size, s.bits, s.mode)) for n, s in plan.schemes.items()]
        model.update_modules(tree_unflatten(coded))
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)
    return model


def batch_of(spec: dict, vocabulary: int) -> Batch:
    """Rows of equal length whose last part is trained; or, with "examples", that many packed into one row."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(spec["rows"]):
        length = spec["tokens"] + 1
        if spec.get("ragged"):
            length = max(8, round(length * (0.3 + 0.7 * (number + 1) / spec["rows"])))
        ids = rng.integers(1, vocabulary, length).astype(np.int32)
        trained = max(1, round(spec["share"] * (length - 1)))
        rows.append(Tokens(ids, (np.arange(length) >= length - trained).astype(np.float32), f"row {number}"))
    return make_batch(rows)


def layout(batch: Batch) -> dict:
    """What the estimate needs to know of a batch."""
    found = {
        "rows": batch.inputs_BL.shape[0],
        "tokens": batch.inputs_BL.shape[1],
        "output_positions": batch.output_positions_BN.shape[1],
    }
    if batch.packing is not None:
        for name, reach in (("reach", batch.packing.everyone), ("output_reach", batch.packing.output_positions)):
            found[name] = list(reach.mask_GQS.shape)
    return found


def main() -> None:
    spec = json.loads(sys.argv[1])
    config = AFMConfig(**spec["config"])
    started = time.perf_counter()
    model = base_model(config, spec.get("base", "float32"))
    add_adapter(model, LoRAConfig(**spec.get("lora", {})))
    mx.eval(model.parameters())
    model.train()
    settings = TrainConfig(optimizer=spec.get("optimizer", "adamw"))
    optimizer = GroupedOptimizer(settings, dict(tree_flatten(model.trainable_parameters())))
    batch = batch_of(spec, config.vocab_size)
    mx.eval(batch.inputs_BL)
    mx.clear_cache()
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    peaks = []
    for _ in range(STEPS):
        train_step(model, optimizer, [batch], clip_norm=1.0, grad_checkpoint=spec.get("grad_checkpoint", False))
        peaks.append(mx.get_peak_memory())
    answer = {"mlx_peak_bytes": peaks[-1], "peaks": peaks, "active_bytes": active, "after": mx.get_active_memory()}
    print(json.dumps({**answer, "layout": layout(batch), "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
