"""Compares what two checkouts of the library write, byte for byte.

    python tools/compare_outputs.py OLD NEW

Each checkout makes in the same folder: everything of `mlx-afm demo`; a training run with its package; a model folder
converted to a torch checkpoint and back; answers to 200 prompts, with and without the adapter. The files are compared
by SHA-256, JSON files without the values that are times, speeds or memory. Exit code 3 if something differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPTS = 200
# Values that no two runs share, and files of nothing else.
MEASURED = ("seconds", "per_second", "per_sec", "time", "memory", "peak", "it_sec", "tokens_sec")
LEFT_OUT = {"training_state.safetensors"}


def main(arguments: list[str]) -> int:
    """Prints what differs between two checkouts."""
    old, new = (Path(argument).resolve() for argument in arguments)
    with tempfile.TemporaryDirectory() as place:
        found = []
        for checkout in (old, new):
            work = Path(place) / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            _make(checkout, work)
            found.append(_hashes(work))
    before, after = found
    different = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    print(f"{len(before.keys() | after.keys())} files, {len(different)} differ")
    for name in different:
        print(f"  {name}: {'only new' if name not in before else 'only old' if name not in after else 'other bytes'}")
    return 3 if different else 0


def _make(checkout: Path, work: Path) -> None:
    """Everything that is compared, written by one checkout."""
    packages = work / ".packages"  # the command line is installed by another name than its folder's
    packages.mkdir()
    (packages / "mlx_afm_cli").symlink_to(checkout / "cli")
    environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{packages}"}

    def run(*command: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "mlx_afm", *command],
            cwd=work,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    demo = work / "demo"
    run("demo", "--out", str(demo))
    data = checkout / "mlx_afm" / "assets" / "demo" / "data"
    model = str(demo / "model")
    run("lora", "--train", "--model", model, "--data", str(data), "--adapter-path", "adapter", "--iters", "20")
    run("export", "--adapter-path", "adapter", "--name", "compared", "--output-dir", "packages", "--model", model)
    run("convert", "--hf-path", model, "--mlx-path", "torch", "--to", "torch")
    run("convert", "--hf-path", "torch", "--mlx-path", "again")
    run("convert", "--hf-path", model, "--mlx-path", "quantized", "-q")
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    (work / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, more in (("base", ()), ("adapter", ("--adapter-path", "adapter"))):
        run("generate", "--model", model, "-p", "prompts.jsonl", "-m", "24", "--output", f"{name}.jsonl", *more)


def _hashes(work: Path) -> dict[str, str]:
    """SHA-256 of each file, by its path."""
    files = (path for path in sorted(work.rglob("*")) if path.is_file() and not path.is_symlink())
    return {
        str(path.relative_to(work)): hashlib.sha256(_content(path)).hexdigest()
        for path in files
        if path.name not in LEFT_OUT and ".packages" not in path.parts
    }


def _content(path: Path) -> bytes:
    """The bytes of a file; of JSON what is not measured."""
    if path.suffix not in (".json", ".jsonl"):
        return path.read_bytes()
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    return "\n".join(json.dumps(_without_measured(json.loads(line))) for line in lines if line).encode()


def _without_measured(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_measured(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: item for key, item in value.items() if not any(word in key for word in MEASURED)}
    return {key: _without_measured(item) for key, item in kept.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
