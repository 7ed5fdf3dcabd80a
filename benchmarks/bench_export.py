"""Exporting an adapter of Apple's sizes, check included: time and peak anonymous memory of the command.

python benchmarks/bench_export.py [--repeat 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from measured import described, run

from mlx_afm.adapters import Adapter, LoRAConfig, adapter_shapes, write_adapter_folder
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.model import AFMConfig

RESULTS = Path(__file__).resolve().parent / "results" / "export.json"


def random_adapter() -> Adapter:
    base, config, rng = AFMConfig(), LoRAConfig(), np.random.default_rng(0)
    shapes = adapter_shapes(base, config)
    values = {name: (0.02 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    return Adapter(config, base, {name: LazyTensor.of(array) for name, array in values.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        write_adapter_folder(folder / "adapter", random_adapter())
        line = [
            "-m",
            "mlx_afm",
            "export",
            "--adapter-path",
            folder / "adapter",
            "--name",
            "box",
            "--output-dir",
            folder,
        ]
        runs = []
        for _ in range(options.repeat):
            shutil.rmtree(folder / "box.fmadapter", ignore_errors=True)
            runs.append(run([sys.executable, *line]))
        size = (folder / "box.fmadapter" / "adapter_weights.bin").stat().st_size
    finally:
        shutil.rmtree(folder)
    found = {
        "package_bytes": size,
        "seconds": statistics.median(one.seconds for one in runs),
        "seconds_of_each": [round(one.seconds, 2) for one in runs],
        "anonymous_bytes": max(one.peak_anonymous_bytes for one in runs),
        **described("mlx-afm", "numpy"),
    }
    options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
