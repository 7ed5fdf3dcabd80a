"""The promises about quantizing a full-size checkpoint, measured: size of the folder, memory of `convert -q`.

    python benchmarks/full_size_quant.py --source FOLDER [--forms apple,affine-4] [--json FILE]

FOLDER is from the oracle script with --full (12.7 GB); some 5 GB more are needed on its disk for a while. Any
toolkit folder will do for a trial.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from measured import described, run

RESULTS = Path(__file__).resolve().parent / "results" / "full_size_quant.json"
FORMS = {
    "apple": ["--q-recipe", "apple"],
    "affine-4": ["--q-bits", "4"],
    "affine-8": ["--q-bits", "8"],
    "mxfp4": ["--q-mode", "mxfp4"],
}
DTYPE = "bfloat16"
LARGEST_FOLDER_BYTES = 1_000_000_000  # of apple's
MOST_MEMORY_BYTES = 2_000_000_000


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(source: Path, target: Path, form: str) -> dict[str, object]:
    line = [sys.executable, "-m", "mlx_afm", "convert", "--hf-path", source, "--mlx-path", target, "--no-tokenizer"]
    done = run([*line, "-q", *FORMS[form], "--dtype", DTYPE, "--json"])
    told = json.loads(done.output)
    found: dict[str, object] = {
        "seconds": done.seconds,
        "anonymous_bytes": done.peak_anonymous_bytes,
        "folder_bytes": folder_bytes(target),
        **{key: told[key] for key in ("bits_per_weight", "quantized", "on_grid", "left_dense")},
    }
    inspected = json.loads(run([sys.executable, "-m", "mlx_afm", "inspect", target, "--json"]).output)
    return {**found, "parameters": inspected["parameters"], "recognised": inspected["recognised"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--forms", default="apple,affine-4")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    found: dict[str, dict[str, object]] = {}
    out = Path(tempfile.mkdtemp(prefix=".quantized.", dir=options.source.resolve().parent))
    try:
        for form in options.forms.split(","):
            found[form] = measure(options.source, out / form, form)
            print(f"{form}: {found[form]}", file=sys.stderr, flush=True)
            shutil.rmtree(out / form)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    promises = {
        "memory": all(facts["anonymous_bytes"] < MOST_MEMORY_BYTES for facts in found.values()),
        "folder": "apple" not in found or found["apple"]["folder_bytes"] < LARGEST_FOLDER_BYTES,
    }
    result = {"forms": found, "dtype": DTYPE, "kept": promises, **described("mlx-afm", "mlx", "numpy")}
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(promises.values()) else 3


if __name__ == "__main__":
    sys.exit(main())
