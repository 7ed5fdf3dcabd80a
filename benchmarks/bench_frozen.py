"""Distillation and the real size, with and without what frozen layers give being kept.

    python benchmarks/bench_frozen.py --data tldr_train.jsonl [--cases distill,full_size] [--json FILE]

    distill     `mlx-afm recover` as a command, 5 epochs over 60 lines, 35 + 21 layers, width 256, vocabulary 16,384,
                random weights, a 4-bit student: the times of --frozen-cache auto with an empty cache and of off, in
                turns; adapters of rank 16 everywhere, and on the last 16 layers
    full_size   one training step of the real model (random weights, bfloat16), 1 x 512 tokens of which a quarter is
                trained, rank 8 on the last 16 layers: from a store that has the example, and whole; seconds, MLX's
                peak, what is estimated before, and how many bytes the process read through system calls

OpenBLAS is preloaded if it is found. The store is on this machine's disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from measured import commit, described, with_openblas
from mlx.utils import tree_flatten

from mlx_afm.files import write_json
from mlx_afm.model import AFMConfig, Model
from mlx_afm.workflows.demo import ASSETS

RESULTS = Path(__file__).resolve().parent / "results" / "frozen.json"
DISTILL = {"hidden_dim": 256, "num_layers": 56, "num_kv_reuse_layers": 21, "vocab_size": 16384, "num_heads": 2}
FORMS = {"everywhere": ["--rank", "16"], "last_16": ["--rank", "16", "--num-layers", "16"]}
EPOCHS, LINES, TURNS = 5, 60, 2
STEP = """
import json, sys, time
import mlx.core as mx, numpy as np
from mlx.utils import tree_flatten
from pathlib import Path
from mlx_afm.adapters import LoRAConfig, add_adapter
from mlx_afm.data import Tokens
from mlx_afm.memory import estimate_training, layout_of
from mlx_afm.model_folder import ModelFolder
from mlx_afm.runs.activation_store import DiskStore
from mlx_afm.training import TrainConfig
from mlx_afm.training.frozen import FrozenLayers
from mlx_afm.training.optimizers import GroupedOptimizer
from mlx_afm.training.step import train_step
from mlx_afm.data import make_batch
from mlx_afm.workflows.estimate import base_of
folder, store, mode = ModelFolder(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
config, lora, settings = folder.config, LoRAConfig(rank=8, layers="last-16"), TrainConfig()
layer = config.num_layers - 16
ids = np.random.default_rng(0).integers(1, config.vocab_size, 513).astype(np.int32)
row = Tokens(ids, (np.arange(513) >= 385).astype(np.float32), "random tokens")
def load():
    below = folder.load_model(layers=range(layer))
    below.train()
    return below
frozen = None
if mode != "whole":
    frozen = FrozenLayers(config, layer, load, DiskStore(store, {"a": "b"}, 1 << 40, print), prefix_end_id=-1)
    began = time.perf_counter()
    batch = frozen.make_batch([row])
    mx.eval(batch.activations.x)
    first = time.perf_counter() - began
    if mode == "fill":
        print(json.dumps({"seconds_to_compute": first})); sys.exit()
model = folder.load_model(layers=range(layer, config.num_layers) if frozen else None)
add_adapter(model, lora)
mx.eval(model.trainable_parameters()); model.train()
optimizer = GroupedOptimizer(settings, dict(tree_flatten(model.trainable_parameters())))
mx.clear_cache(); mx.reset_peak_memory()
seconds = []
for _ in range(3):
    began = time.perf_counter()
    batch = frozen.make_batch([row]) if frozen else make_batch([row])
    result = train_step(model, optimizer, [batch], clip_norm=1.0)
    seconds.append(time.perf_counter() - began)
peak = mx.get_peak_memory()
estimate = estimate_training(config, base_of(folder), lora, layout_of(batch), unloaded_layers=layer if frozen else 0)
io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
print(json.dumps({"loss": result.loss / result.tokens, "seconds": seconds[1:], "mlx_peak_bytes": peak,
                  "estimated_peak_bytes": estimate.peak_bytes, "estimate_ratio": estimate.peak_bytes / peak,
                  "bytes_read": int(io["rchar"]), "computed": frozen.computed if frozen else None}))
"""


def random_folder(folder: Path, config: AFMConfig, dtype: mx.Dtype) -> Path:
    """A model folder of random weights with the demo's tokenizer."""
    folder.mkdir(parents=True)
    mx.random.seed(0)
    model = Model(config)
    for layer in model.model.layers:
        layer.self_attn.quant_key_scale = layer.self_attn.quant_value_scale = mx.array(0.03)
    tensors = {}
    for name, array in tree_flatten(model.parameters()):
        tensors[name] = array if name.endswith("_scale") else array.astype(dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    write_json(folder / "config.json", config.to_dict())
    (folder / "tokenizer.model").write_bytes((ASSETS / "tokenizer.model").read_bytes())
    return folder


def timed(words: list[object], cache: Path) -> float:
    began = time.perf_counter()
    line = [sys.executable, "-m", "mlx_afm", *map(str, words)]
    subprocess.run(line, check=True, capture_output=True, env={**os.environ, "MLX_AFM_CACHE": str(cache)})
    return time.perf_counter() - began


def distill(data: Path, folder: Path) -> dict[str, Any]:
    teacher = random_folder(folder / "teacher", AFMConfig(**DISTILL), mx.float32)
    timed(["convert", "--hf-path", teacher, "--mlx-path", folder / "student", "-q", "--q-bits", 4], folder / "cache")
    train = folder / "train.jsonl"
    with data.open(encoding="utf-8") as lines:
        train.write_text("".join(line for line, _ in zip(lines, range(LINES))), encoding="utf-8")
    found: dict[str, Any] = {}
    for form, options in FORMS.items():
        seconds: dict[str, list[float]] = {"auto": [], "off": []}
        for turn in range(TURNS):
            for mode in seconds:
                line = ["recover", "--model", folder / "student", "--teacher", teacher, "--data", train, *options]
                line += ["--adapter-path", folder / f"{form} {mode} {turn}", "--epochs", EPOCHS, "--batch-size", 4]
                seconds[mode].append(timed([*line, "--frozen-cache", mode], folder / f"cache {form} {mode} {turn}"))
        ratio = statistics.median(seconds["auto"]) / statistics.median(seconds["off"])
        found[form] = {"time_ratio": ratio, **{mode: [round(each, 1) for each in seconds[mode]] for mode in seconds}}
        print(form, json.dumps(found[form]), flush=True)
    return found


def full_size(folder: Path) -> dict[str, Any]:
    model = random_folder(folder / "real", AFMConfig(), mx.bfloat16)
    found: dict[str, Any] = {"weights_bytes": (model / "model.safetensors").stat().st_size}
    for mode in ("fill", "store", "whole"):
        line = [sys.executable, "-c", STEP, str(model), str(folder / "store"), mode]
        found[mode] = json.loads(
            subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
        print(mode, json.dumps(found[mode]), flush=True)
    found["time_ratio"] = min(found["store"]["seconds"]) / min(found["whole"]["seconds"])
    found["memory_ratio"] = found["store"]["mlx_peak_bytes"] / found["whole"]["mlx_peak_bytes"]
    found["store_bytes"] = sum(path.stat().st_size for path in (folder / "store").rglob("*.values"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cases", default="distill,full_size")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    blas = with_openblas()
    cases = json.loads(options.json.read_text())["cases"] if options.json.exists() else {}
    for case in options.cases.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found = distill(options.data, Path(folder)) if case == "distill" else full_size(Path(folder))
        cases[case] = {**found, "commit": commit()}
        facts = {**described("mlx", "numpy"), "blas": blas}
        options.json.write_text(json.dumps({"cases": cases, **facts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
