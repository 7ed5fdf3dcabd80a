"""Training steps at the real model's size: time, MLX's peak, and what `estimate` says before.

    python benchmarks/full_size_step.py --model FOLDER [--tokens 512] [--json FILE]

FOLDER is a quantized or dense MLX folder of the real model; its weights may be random. One example of random tokens, a
quarter of them trained, every layer checkpointed, rank 32 on all projections, AdamW.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from measured import described
from mlx.utils import tree_flatten

from mlx_afm.adapters import LoRAConfig, add_adapter
from mlx_afm.data import Tokens, make_batch
from mlx_afm.memory import estimate_training, layout_of
from mlx_afm.model_folder import ModelFolder
from mlx_afm.training import TrainConfig
from mlx_afm.training.optimizers import GroupedOptimizer
from mlx_afm.training.step import train_step
from mlx_afm.workflows.estimate import base_of

RESULTS = Path(__file__).resolve().parent / "results" / "full_size_step.json"
STEPS = 2  # the optimizer's state is there from the second on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    lora, settings = LoRAConfig(), TrainConfig()
    model = ModelFolder(options.model).load_model()
    ids = np.random.default_rng(0).integers(1, model.args.vocab_size, options.tokens + 1).astype(np.int32)
    weights = (np.arange(len(ids)) >= len(ids) - options.tokens // 4).astype(np.float32)
    batch = make_batch([Tokens(ids, weights, "random tokens")])
    estimate = estimate_training(
        model.args,
        base_of(ModelFolder(options.model)),
        lora,
        layout_of(batch),
        optimizer=settings.optimizer,
        grad_checkpoint=True,
    )
    add_adapter(model, lora)
    mx.eval(model.parameters())
    model.train()
    optimizer = GroupedOptimizer(settings, dict(tree_flatten(model.trainable_parameters())))
    mx.clear_cache()
    mx.reset_peak_memory()
    seconds, losses = [], []
    for _ in range(STEPS):
        began = time.perf_counter()
        result = train_step(model, optimizer, [batch], clip_norm=1.0, grad_checkpoint=True)
        seconds.append(time.perf_counter() - began)
        losses.append(result.loss / result.tokens)
    peak = mx.get_peak_memory()
    found = {
        "tokens": options.tokens,
        "bits": json.loads((options.model / "config.json").read_text()).get("quantization", {}).get("bits"),
        "losses": losses,
        "seconds_of_a_step": seconds,
        "mlx_peak_bytes": peak,
        "estimated_peak_bytes": estimate.peak_bytes,
        "estimate_ratio": estimate.peak_bytes / peak,
        "resident_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **described("mlx-afm", "mlx", "numpy"),
    }
    cases = json.loads(options.json.read_text())["cases"] if options.json.exists() else {}
    cases[f"{found['bits'] or 'no'}-bit"] = found
    options.json.write_text(json.dumps({"cases": cases}, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
