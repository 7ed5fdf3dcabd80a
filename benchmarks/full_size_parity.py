"""Parity at the real size: our engine against `tamm` on the same random float32 weights.

    make_tamm_checkpoint.py --full --no-kv-quant --batch 1 --new-tokens 24 --out FOLDER   (13 GB)
    LD_PRELOAD=libopenblas.so.0 python benchmarks/full_size_parity.py --source FOLDER

The checkpoint is converted to a float32 folder beside it (13 GB more, for a while). For the base and for the base with
the adapter: the logits of the prompt's last token, and as many greedy tokens as the reference made, by
the decode engine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measured import commit, described, run

RESULTS = Path(__file__).resolve().parent / "results" / "full_size_parity.json"

COMPARE = """
import sys, json, numpy as np, mlx.core as mx, mlx_afm
from pathlib import Path
from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.engine import Engine
from mlx_afm.generation.forms import decoder_of
from mlx_afm.generation.rows import Request
folder, source, name = sys.argv[1:]
adapter = Path(source, "adapter-final.pt") if name == "adapter" else None
model, _ = mlx_afm.load(folder, adapter_path=adapter)
arrays = np.load(Path(source, "logits.npz"))
ids = arrays["input_ids"][0].tolist()
logits = np.array(model.logits(model.hidden(mx.array([ids]), output_positions=mx.array([[len(ids) - 1]])))[:, 0])
wanted, margins = arrays[f"greedy_{name}"][0].tolist(), arrays[f"greedy_{name}_margin"][0]
held = decoder_of(model)
engine = Engine(held.decoder, routes=held.routes)
(row,) = engine.add(Request(ids=ids, config=GenerateConfig(max_tokens=len(wanted), temp=0.0)))
while engine.busy:
    engine.step()
found = row.tokens
equal = [a == b for a, b in zip(found, wanted)]
print(json.dumps({
    "largest_difference_of_logits": float(np.abs(logits - arrays[f"logits_{name}"]).max()),
    "mean_absolute_logit": float(np.abs(arrays[f"logits_{name}"]).mean()),
    "greedy_tokens_equal": equal.index(False) if False in equal else len(equal),
    "greedy_tokens": len(wanted),
    "smallest_margin": float(margins.min()),
}))
"""


def measure(source: Path) -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=source) as folder:
        line = ["convert", "--hf-path", source, "--mlx-path", folder + "/model", "--dtype", "float32", "--no-tokenizer"]
        run([sys.executable, "-m", "mlx_afm", *line, "--json"])
        names = ("base", "adapter")
        done = {name: run([sys.executable, "-c", COMPARE, folder + "/model", source, name]) for name in names}
        return {name: json.loads(result.output.splitlines()[-1]) for name, result in done.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = {**measure(options.source), "commit": commit(), **described("mlx", "numpy", "torch", "tamm")}
    print(json.dumps(result, indent=2))
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
