"""The estimate of `mlx_afm.memory` beside MLX's measured peak: one fresh process per setting.

    python benchmarks/bench_memory.py [--only NAME;...] [--json FILE] [--measured FILE]

Each process builds a model with random weights, puts an adapter on it and takes two training steps as `lora` does
(memory_side.py). Ends with 1 if any ratio estimate / measured is off by more than 15 %. Memory does not depend on the
BLAS; OpenBLAS only makes this quicker: LD_PRELOAD=libopenblas.so.0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measured import described

from mlx_afm.adapters import LoRAConfig
from mlx_afm.checkpoints.names import Kind, plan_names
from mlx_afm.memory import Base, Layout, MemoryEstimate, estimate_training
from mlx_afm.model import AFMConfig, ToolkitConfig
from mlx_afm.quant import QuantConfig, plan_schemes

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "memory.json"
LIMIT = 0.15


def sizes(width: int, ordinary: int, reusing: int, vocabulary: int, head: int = 64) -> dict:
    layers = {"num_layers": ordinary + reusing, "num_kv_reuse_layers": reusing, "num_kv_heads": 2}
    return {"vocab_size": vocabulary, "hidden_dim": width, "num_heads": width // head, **layers}


def rows(count: int, tokens: int, share: float, **others: object) -> dict:
    return {"rows": count, "tokens": tokens, "share": share, **others}


SMALL, MIDDLE, REAL = sizes(256, 6, 2, 16384), sizes(512, 4, 2, 16384), sizes(256, 3, 1, 153600)
RANK = {"lora": {"rank": 16}}
SETTINGS = {
    "width 256": {"config": SMALL, **rows(4, 256, 0.25), **RANK},
    "width 256, checkpointing": {"config": SMALL, **rows(4, 256, 0.25), **RANK, "grad_checkpoint": True},
    "width 256, 1 x 1024, all trained": {"config": SMALL, **rows(1, 1024, 1.0), **RANK},
    "width 256, 2 x 512, 14 reusing, checkpointing": {
        "config": sizes(256, 4, 14, 4096),
        **rows(2, 512, 0.5),
        **RANK,
        "grad_checkpoint": True,
    },
    "width 256, packed row": {"config": SMALL, **rows(24, 96, 0.3, ragged=True), **RANK},
    "width 256, full, adamw": {"config": SMALL, **rows(2, 64, 0.5), "lora": {"fine_tune_type": "full"}},
    "width 256, full, sgd": {
        "config": SMALL,
        **rows(2, 64, 0.5),
        "lora": {"fine_tune_type": "full"},
        "optimizer": "sgd",
    },
    "width 256, rank 128, q and v": {
        "config": SMALL,
        **rows(4, 128, 0.5),
        "lora": {"rank": 128, "targets": ["q", "v"]},
    },
    "width 256, reusing layers only": {"config": SMALL, **rows(4, 256, 0.5), "lora": {"rank": 16, "layers": "reuse"}},
    "width 256, dora": {"config": SMALL, **rows(4, 128, 0.5), "lora": {"rank": 16, "fine_tune_type": "dora"}},
    "width 256, bfloat16": {"config": SMALL, **rows(2, 128, 0.5), **RANK, "base": "bfloat16"},
    "width 256, 4-bit affine": {"config": SMALL, **rows(4, 128, 0.5), **RANK, "base": "float32/affine4"},
    "width 256, 2-bit balanced": {"config": SMALL, **rows(4, 128, 0.5), **RANK, "base": "float32/balanced2"},
    "width 256, vocabulary 153,600": {"config": REAL, **rows(2, 256, 0.25), **RANK},
    "width 256, vocabulary 153,600, all trained": {"config": REAL, **rows(2, 192, 1.0), **RANK},
    "width 512": {"config": MIDDLE, **rows(4, 256, 0.25), **RANK},
    "width 512, sgd, checkpointing": {
        "config": MIDDLE,
        **rows(4, 256, 0.5),
        **RANK,
        "optimizer": "sgd",
        "grad_checkpoint": True,
    },
    "width 1024": {"config": sizes(1024, 3, 1, 16384, 128), **rows(2, 256, 0.25), "lora": {"rank": 32}},
    "width 1024, checkpointing": {
        "config": sizes(1024, 3, 1, 16384, 128),
        **rows(2, 256, 0.25),
        "lora": {"rank": 32},
        "grad_checkpoint": True,
    },
}


def measured(setting: dict) -> dict:
    line = [sys.executable, str(HERE / "memory_side.py"), json.dumps(setting)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict = json.loads(done.stdout)
    return answer


def base_of(name: str, config: AFMConfig) -> Base:
    """`bfloat16`, or with codes `bfloat16/affine4`."""
    dtype, _, mode = name.partition("/")
    if not mode:
        return Base(dtype=dtype)
    entries = plan_names(ToolkitConfig(model=config, adapter=None))
    shapes = {e.ours.removesuffix(".weight"): e.shape for e in entries if e.kind is Kind.WEIGHT and len(e.shape) == 2}
    quantization = QuantConfig(mode=mode[:-1], bits=int(mode[-1]))
    return Base(dtype=dtype, schemes=plan_schemes(quantization, shapes).schemes)  # type: ignore[arg-type]


def estimated(setting: dict, layout: dict) -> MemoryEstimate:
    config = AFMConfig(**setting["config"])
    shape = {name: tuple(value) if isinstance(value, list) else value for name, value in layout.items()}
    return estimate_training(
        config,
        base_of(setting.get("base", "float32"), config),
        LoRAConfig(**setting["lora"]),
        Layout(**shape),
        optimizer=setting.get("optimizer", "adamw"),
        grad_checkpoint=setting.get("grad_checkpoint", False),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="some settings, with semicolons between")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--measured", type=Path, help="take the measured peaks from an earlier result")
    options = parser.parse_args()
    earlier = json.loads(options.measured.read_text())["cases"] if options.measured else {}
    cases = {}
    for name in options.only.split(";") if options.only else SETTINGS:
        found = earlier[name]["measured"] if name in earlier else measured(SETTINGS[name])
        estimate = estimated(SETTINGS[name], found["layout"])
        ratio = estimate.peak_bytes / found["mlx_peak_bytes"]
        print(f"{estimate.peak_bytes / 1e6:9.1f} MB {found['mlx_peak_bytes'] / 1e6:9.1f} MB {ratio:6.3f}  {name}")
        parts = {part: getattr(estimate, part) for part in estimate.__dataclass_fields__}
        cases[name] = {
            "memory_ratio": ratio,
            "measured": found,
            "estimate": parts,
            "setting": SETTINGS[name],
        }
    worst = max(cases, key=lambda name: abs(cases[name]["memory_ratio"] - 1))
    print(f"worst of {len(cases)}: {cases[worst]['memory_ratio']:.3f}, {worst}")
    options.json.write_text(json.dumps({"cases": cases, "worst": worst, **described("mlx", "numpy")}, indent=1) + "\n")
    return int(abs(cases[worst]["memory_ratio"] - 1) > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
