"""Our conversion of a toolkit checkpoint against torch's way, and against a plain copy of as many bytes.

    python benchmarks/bench_convert.py --source FOLDER [--dtype bfloat16] [--repeat 4] [--json FILE]

FOLDER holds base-model.pt and its JSON, for instance from the oracle script with --full. All contenders run in
one go, interleaved, each in a process of its own, to the same disk, and sync what they wrote. The source is read
once before, and each turn begins with another contender, so that nobody always pays for a cold disk; medians. Memory is
peak anonymous memory. A ratio is ours / other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from measured import Measured, described, read_once, run

RESULTS = Path(__file__).resolve().parent / "results" / "convert.json"

TORCH = """
import os, sys, torch
from safetensors.torch import save_file
source, target, dtype, mmap = sys.argv[1:5]
state = torch.load(source, mmap=mmap == "mmap", weights_only=True)
state.pop("output_transform.weight", None)
cast = getattr(torch, dtype)
state = {k: v.to(cast) if v.is_floating_point() else v.clone() for k, v in state.items()}
save_file(state, target)
with open(target, "rb") as handle:
    os.fsync(handle.fileno())
"""
COPY = """
import os, sys
source, target, bytes_out = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open(source, "rb", buffering=0) as read, open(target, "wb", buffering=0) as write:
    written, size = 0, os.path.getsize(source)
    done = 0
    while piece := read.read(1 << 26):
        done += len(piece)
        due = bytes_out * done // size - written
        write.write(memoryview(piece)[:due])
        written += due
    os.fsync(write.fileno())
"""


def contenders(source: Path, out: Path, dtype: str, bytes_out: int) -> dict[str, list[object]]:
    weights, python = source / "base-model.pt", sys.executable
    line = ["-m", "mlx_afm", "convert", "--hf-path", source, "--mlx-path", out / "ours", "--no-tokenizer", "--json"]
    return {
        "ours": [python, *line, "--dtype", dtype],
        "torch": [python, "-c", TORCH, weights, out / "torch.safetensors", dtype, "read"],
        "torch-mmap": [python, "-c", TORCH, weights, out / "torch.safetensors", dtype, "mmap"],
        "copy": [python, "-c", COPY, weights, out / "copy", bytes_out],
    }


def measure(source: Path, dtype: str, repeat: int) -> dict[str, list[Measured]]:
    weights = source / "base-model.pt"
    share = {"float32": 1.0, "bfloat16": 0.5, "float16": 0.5}[dtype]
    found: dict[str, list[Measured]] = {}
    read_once(weights)
    for turn in range(repeat):
        with tempfile.TemporaryDirectory(dir=source) as folder:
            lines = contenders(source, Path(folder), dtype, int(weights.stat().st_size * share))
            order = list(lines)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                line = lines[name]
                found.setdefault(name, []).append(run(line))
                print(f"turn {turn + 1} {name}: {found[name][-1].seconds:.1f} s", file=sys.stderr)
                for made in Path(folder).iterdir():
                    shutil.rmtree(made) if made.is_dir() else made.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = measure(options.source, options.dtype, options.repeat)
    seconds = {name: statistics.median(one.seconds for one in runs) for name, runs in found.items()}
    memory = {name: max(one.peak_anonymous_bytes for one in runs) for name, runs in found.items()}
    cases = {}
    print(f"{'':12}{'seconds':>9}{'ours/this':>11}{'anonymous MB':>14}{'ours/this':>11}")
    for name in ("ours", "torch", "torch-mmap", "copy"):
        ratio, memory_ratio = seconds["ours"] / seconds[name], memory["ours"] / memory[name]
        print(f"{name:12}{seconds[name]:9.1f}{ratio:11.2f}{memory[name] / 1e6:14.0f}{memory_ratio:11.3f}")
        cases[name] = {
            "seconds": seconds[name], "anonymous_bytes": memory[name], "time_ratio": ratio, "memory_ratio": memory_ratio
        }  # fmt: skip
    size = (options.source / "base-model.pt").stat().st_size
    result = {"cases": cases, "file_bytes": size, "dtype": options.dtype, "repeat": options.repeat}
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(
        json.dumps({**result, **described("mlx", "numpy", "torch", "safetensors")}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
