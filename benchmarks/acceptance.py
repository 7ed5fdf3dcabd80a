"""Measures what the library promises and writes the figures down: docs/parity.md and results/acceptance.json.

    LD_PRELOAD=libopenblas.so.0 python benchmarks/acceptance.py [--only parity,tldr,package,demo]

parity   our model against tamm on fresh oracles (torch, tamm and the oracle script are needed)
tldr     an adapter on real data, ../shared/data/tldr_*.jsonl, from the tiny base: validation and test loss
package  a full-size random adapter: export, our check, the independent validator, coremltools
demo     `mlx-afm demo`, with the wheel's own BLAS (it starts itself again without LD_PRELOAD)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "parity")]

from mlx_afm.adapters import Adapter, LoRAConfig, adapter_shapes, write_adapter_pt  # noqa: E402
from mlx_afm.formats.tensors import LazyTensor  # noqa: E402
from mlx_afm.model import AFMConfig  # noqa: E402
from oracle import (  # noqa: E402
    FRESH,
    SHARED,
    greedy_agreement,
    hidden_of_every_layer,
    load_oracle,
    loss_and_gradient_errors,
    make_oracle,
)


def parity(folder: Path) -> dict:
    return {name: oracle_figures(make_oracle(folder / name, *options)) for name, options in FRESH.items()}


def largest(ours: mx.array, reference: np.ndarray) -> float:
    return float(np.abs(np.array(ours) - reference).max())


def oracle_figures(folder: Path) -> dict:
    case = load_oracle(folder)
    wanted, figures = case.outputs, {}
    for name, model in (("base", case.base), ("adapter", case.adapted)):
        figures[f"logits_{name}"] = largest(model(case.tokens), wanted[f"logits_{name}"])
        hidden, keys, values = hidden_of_every_layer(model, case.tokens)
        figures[f"hidden_{name}"] = max(largest(h, w) for h, w in zip(hidden, wanted[f"hidden_{name}"]))
        if name == "base" and "reused_key" in wanted:
            figures["reused_kv"] = max(largest(keys, wanted["reused_key"]), largest(values, wanted["reused_value"]))
        figures[f"greedy_{name}"] = "{}/{}".format(*greedy_agreement(case, name))
    documents = mx.array(wanted["packed_segment_ids"].astype(np.int32))
    packed = case.adapted.logits(case.adapted.hidden(case.tokens, documents=documents))
    figures["logits_packed"] = largest(packed, wanted["packed_logits_adapter"])
    loss, errors = loss_and_gradient_errors(case)
    keys_values = [error for name, error in errors.items() if ".k." in name or ".v." in name]
    return figures | {"loss": loss, "gradients": max(errors.values()), "gradients_kv": max(keys_values)}


def command(*arguments: object, plain_blas: bool = False) -> dict:
    environment = {k: v for k, v in os.environ.items() if not (plain_blas and k == "LD_PRELOAD")}
    line = [sys.executable, "-m", "mlx_afm", *map(str, arguments), "--json"]
    with tempfile.TemporaryDirectory() as here:  # no adapters folder of an earlier run beside us
        done = subprocess.run(line, capture_output=True, text=True, env=environment, check=True, cwd=here)
    return json.loads(done.stdout)


def tldr(folder: Path) -> dict:
    """Steps are capped; every line of the three files is read and checked."""
    from mlx_afm.workflows.convert import convert
    from mlx_afm.workflows.demo import write_toolkit_folder

    model = convert(write_toolkit_folder(folder / "toolkit"), folder / "model").folder
    data = folder / "data"
    data.mkdir()
    for split in ("train", "valid", "test"):
        shutil.copyfile(SHARED / "data" / f"tldr_{split}.jsonl", data / f"{split}.jsonl")
    base_of, adapter = ("--model", model, "--data", data), ("--adapter-path", folder / "adapter")
    settings = ("--iters", 200, "--batch-size", 16, "--learning-rate", "2e-3", "--steps-per-eval", 100)
    base = command("lora", "--test", *base_of)
    trained = command("lora", "--train", "--test", *base_of, *adapter, *settings)
    events = [json.loads(line) for line in (folder / "adapter" / "metrics.jsonl").read_text().splitlines()]
    evaluations = {event["step"]: event["loss"] for event in events if event["event"] == "eval"}
    return {
        "train_lines": sum(1 for _ in (data / "train.jsonl").open()),
        "steps": trained["steps"],
        "valid_loss_by_step": evaluations,
        "test_loss_base": base["test_loss"],
        "test_loss_adapter": trained["test_loss"],
        "test_examples": trained["test_examples"],
    }


def package(folder: Path) -> dict:
    base, config, rng = AFMConfig(), LoRAConfig(), np.random.default_rng(0)
    shapes = adapter_shapes(base, config)

    def values(shape):
        return LazyTensor("float32", shape, lambda: rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02))

    adapter = Adapter(config, base, {name: values(shape) for name, shape in shapes.items()})
    write_adapter_pt(folder / "adapter-final.pt", adapter)
    started = time.perf_counter()
    report = command("export", "--adapter-path", folder / "adapter-final.pt", "--name", "full", "--output-dir", folder)
    seconds = time.perf_counter() - started
    target = folder / "full.fmadapter"
    validator = [sys.executable, SHARED / "reference" / "check_fmadapter.py", target, "--summary", "--byte-exact"]
    verdict = subprocess.run(
        [*validator, "--expect", expected(folder), "--coremltools"], capture_output=True, text=True
    )
    return {
        "bytes": (target / "adapter_weights.bin").stat().st_size,
        "export_seconds_with_start": seconds,
        "our_check_ok": report["ok"],
        "fits_device": report["fits_device"],
        "independent_validator": verdict.stdout.strip().splitlines()[-1],
    }


def expected(folder: Path) -> Path:
    from mlx_afm.formats.torch_file import read_torch

    tensors = {name: np.array(tensor.read_values()) for name, tensor in read_torch(folder / "adapter-final.pt").items()}
    np.savez(folder / "expected.npz", **tensors)
    return folder / "expected.npz"


def demo(folder: Path) -> dict:
    started = time.perf_counter()
    result = command("demo", "--out", folder / "demo", plain_blas=True)
    kept = ("exact_match_before", "exact_match_after", "exact_match_fused", "valid_loss", "package_ok")
    return {"seconds": time.perf_counter() - started, **{name: result[name] for name in kept}}


COLUMNS = (
    "logits_base", "hidden_base", "reused_kv", "logits_adapter", "logits_packed", "loss", "gradients", "gradients_kv",
    "greedy_base", "greedy_adapter",
)  # fmt: skip


def parity_page(cases: dict, machine: dict) -> str:
    def cell(value) -> str:
        return "-" if value is None else value if isinstance(value, str) else f"{value:.1e}"

    rows = [f"| {name} | " + " | ".join(cell(case.get(c)) for c in COLUMNS) + " |" for name, case in cases.items()]
    real = json.loads((ROOT / "benchmarks" / "results" / "full_size_parity.json").read_text())
    full = [
        f"| {name} | {real[name]['largest_difference_of_logits']:.1e} "
        f"| {real[name]['greedy_tokens_equal']}/{real[name]['greedy_tokens']} | {real[name]['smallest_margin']:.1e} |"
        for name in ("base", "adapter")
    ]
    return f"""# Parity with the reference

Written by `benchmarks/acceptance.py`: our model against Apple's MIT-licensed `tamm` on torch, same random weights,
float32. Largest absolute differences; for gradients |difference| / |reference| by norm, the worst of
all adapter tensors and of the key and value ones (mlx-lm has zeros there). Greedy: tokens equal, of those
whose first choice leads by more than 1e-3. `-plain` is without the key and value quantizers, whose rounding boundaries
turn 1e-7 into a visible step; that is why those limits are wider.

Limits, held by `tests/parity`: logits 2e-5 plain, 1e-2 quantized, gradients 1e-3. `default`: 3 + 2 layers, 4 query and
2 key heads, width 64; `heads` 2 + 3 layers, 8 and 1 heads, width 96; `uniform` 4 layers, no reuse.

| case | {" | ".join(name.replace("_", " ") for name in COLUMNS)} |
|---{"|---" * len(COLUMNS)}|
{chr(10).join(rows)}

{machine["date"]}, {machine["platform"]}, {", ".join(f"{n} {v}" for n, v in machine["versions"].items())}.

## At the real size

35 + 21 layers, width 2048, 3,178,001,792 random float32 weights, without the key and value quantizers. Written by
`benchmarks/full_size_parity.py`, which says how the checkpoint is made; tokens by the decode engine. Limit: 2e-5.

| case | logits of the last token | greedy tokens equal | smallest lead of a first choice |
|---|---|---|---|
{chr(10).join(full)}

{real["date"]}, commit {real["commit"]}, {", ".join(f"{n} {v}" for n, v in real["versions"].items())}.
"""


def described() -> dict:
    names = ("mlx", "mlx-lm", "numpy", "torch", "tamm", "coremltools")
    return {
        "date": date.today().isoformat(),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, CPU backend",
        "preload": os.environ.get("LD_PRELOAD", ""),
        "versions": {name: version(name) for name in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="parity,tldr,package,demo")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "acceptance.json")
    options = parser.parse_args()
    results = json.loads(options.json.read_text()) if options.json.is_file() else {}
    results["machine"] = described()
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = {"parity": parity, "tldr": tldr, "package": package, "demo": demo}[name](Path(folder))
        print(name, json.dumps(results[name], indent=2), flush=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if "parity" in results:
        (ROOT / "docs" / "parity.md").write_text(parity_page(results["parity"], results["machine"]))


if __name__ == "__main__":
    main()
