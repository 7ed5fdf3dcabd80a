"""The promises about a full-size checkpoint, measured: memory, equality, strict loading, logits, inspect.

    python benchmarks/full_size.py --source FOLDER [--json FILE]

FOLDER is from the oracle script with --full (12.7 GB); about 45 GB more are needed on its disk for a while.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from measured import described, run

from mlx_afm.checkpoints.names import Kind, plan_names
from mlx_afm.checkpoints.toolkit import find_toolkit_files, read_toolkit_checkpoint
from mlx_afm.checkpoints.verify import require_same_values
from mlx_afm.formats.mlx_folder import read_shards
from mlx_afm.formats.torch_file import read_torch

RESULTS = Path(__file__).resolve().parent / "results" / "full_size.json"
BLOCK = 1 << 24

STRICT = """
import sys, torch, tamm.utils.json
from pathlib import Path
folder = Path(sys.argv[1])
config = tamm.utils.json.loads((folder / "base-model-config.json").read_text())
config.device = "meta"
state = torch.load(folder / "base-model.pt", mmap=True, weights_only=True)
result = config.create_model().load_state_dict(state, strict=True, assign=True)
print(len(state), len(result.missing_keys), len(result.unexpected_keys))
"""
LOGITS = """
import sys, json, numpy as np, mlx.core as mx, mlx_afm
from pathlib import Path
model, _ = mlx_afm.load(sys.argv[1])
with np.load(Path(sys.argv[2]) / "logits.npz") as arrays:
    tokens, wanted = mx.array(arrays["input_ids"].astype(np.int32)), arrays["logits_base"]
needed = mx.array([[tokens.shape[1] - 1]])
found = np.array(model.logits(model.hidden(tokens, output_positions=needed))[:, 0])
print(json.dumps({"max_difference": float(np.abs(found - wanted).max()), "mean_logit": float(np.abs(wanted).mean()),
                  "same_argmax": bool((found.argmax(-1) == wanted.argmax(-1)).all())}))
"""


def command(*words: object) -> list[object]:
    return [sys.executable, "-m", "mlx_afm", *words]


def rounded_to_even(block: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bit patterns, by integer arithmetic alone: an independent rounding."""
    bits = block.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bfloat16_is_rounded(source: Path, folder: Path) -> int:
    """Number of weights compared; every value must be the original rounded to nearest even."""
    checkpoint, ours, count = read_toolkit_checkpoint(find_toolkit_files(source)), read_shards(folder), 0
    for entry in plan_names(checkpoint.config):
        if entry.kind is not Kind.WEIGHT:
            continue
        wide = checkpoint.tensors[entry.toolkit].read_values().reshape(-1)
        narrow = ours[entry.ours].read_stored().reshape(-1)
        for start in range(0, wide.size, BLOCK):
            rows = slice(start, start + BLOCK)
            assert np.array_equal(rounded_to_even(wide[rows]), narrow[rows]), entry.ours
        count += wide.size
    return count


def measure(source: Path, out: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    inspected = run(command("inspect", source / "base-model.pt", "--json"))
    found["inspect"] = {"seconds_with_start": inspected.seconds, "anonymous_bytes": inspected.peak_anonymous_bytes}
    found["inspect"] |= {k: json.loads(inspected.output)[k] for k in ("tensors", "parameters", "recognised")}
    for dtype in ("bfloat16", "float32"):
        line = command("convert", "--hf-path", source, "--mlx-path", out / dtype, "--dtype", dtype, "--no-tokenizer")
        done = run([*line, "--json"])
        found[f"convert_{dtype}"] = {"seconds": done.seconds, "anonymous_bytes": done.peak_anonymous_bytes}
        if dtype == "bfloat16":
            found["bfloat16_weights_rounded_to_even"] = bfloat16_is_rounded(source, out / dtype)
            shutil.rmtree(out / dtype)
    back = run(command("convert", "--hf-path", out / "float32", "--to", "torch", "--out", out / "back", "--json"))
    found["convert_back"] = {"seconds": back.seconds, "anonymous_bytes": back.peak_anonymous_bytes}
    original, returned = read_torch(source / "base-model.pt"), read_torch(out / "back" / "base-model.pt")
    require_same_values(original, returned, where=out)
    found["tensors_bit_identical"] = len(original)
    found["tamm_strict_keys_missing_unexpected"] = run([sys.executable, "-c", STRICT, out / "back"]).output.strip()
    shutil.rmtree(out / "back")
    if (source / "logits.npz").is_file():
        forward = run([sys.executable, "-c", LOGITS, out / "float32", source])
        found["logits_of_the_last_token"] = json.loads(forward.output) | {"seconds_with_load": forward.seconds}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.source) as folder:
        found = measure(options.source, Path(folder))
    result = {**found, **described("mlx", "numpy", "torch", "tamm")}
    print(json.dumps(result, indent=2))
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
