"""A package of Apple's sizes: written, opened and brought back, with the memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mlx_afm.adapters import read_adapter, write_adapter_folder
from mlx_afm.model import AFMConfig
from mlx_afm.workflows.export import convert_adapter
from tiny import random_adapter

# Not ru_maxrss: it begins with what the process that started this one had in memory.
PEAK = """
import json, re, sys, time
from pathlib import Path
from mlx_afm.adapters import read_adapter
from mlx_afm.workflows.export import ExportConfig, export_package

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

"""
EXPORT = """
folder, out = map(Path, sys.argv[1:])
started = time.perf_counter()
result = export_package(ExportConfig(adapter=folder, name="box", output_dir=out))
told = {"seconds": time.perf_counter() - started, "peak_bytes": peak(), "fits": result.report.fits_device}
told["bytes"] = (result.package / "adapter_weights.bin").stat().st_size
print(json.dumps({**told, "findings": len(result.report.findings)}))
"""
OPEN = """
before = peak()
adapter = read_adapter(Path(sys.argv[1]))
assert len(adapter.weights) == 700 and adapter.base.num_layers == 56
print(peak() - before)
"""


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", PEAK + code, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_full_size_adapter(tmp_path):
    """Export, lazy reading, and import to both other forms; every value compared."""
    base = AFMConfig()
    write_adapter_folder(tmp_path / "a", random_adapter(base))
    told = run(EXPORT, tmp_path / "a", tmp_path)
    print(told)
    assert (told["bytes"], told["fits"], told["findings"]) == (133_312_320, True, 0)
    assert told["peak_bytes"] < 400e6
    package = tmp_path / "box.fmadapter"
    # The check for NaN maps each page of the file once; the values are not copied.
    assert run(OPEN, package) < told["bytes"] + 60e6, "opening a package copies its values"
    wanted = read_adapter(tmp_path / "a").weights
    for target in (tmp_path / "back", tmp_path / "back.pt"):
        found = read_adapter(convert_adapter(package, target)).weights
        assert list(found) == list(wanted)
        assert all(np.array_equal(found[name].read_values(), tensor.read_values()) for name, tensor in wanted.items())
    for path in (package / "adapter_weights.bin", tmp_path / "a" / "adapters.safetensors", tmp_path / "back.pt"):
        os.remove(path)
    (tmp_path / "back" / "adapters.safetensors").unlink()
