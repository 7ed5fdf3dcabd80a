"""A conversion killed at any moment leaves nothing that `load` takes for a whole model."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlx_afm import convert, load
from mlx_afm.checkpoints.names import Kind, plan_names
from mlx_afm.checkpoints.verify import require_same_values
from mlx_afm.errors import AFMError
from mlx_afm.files import write_json
from mlx_afm.formats.mlx_folder import read_shards
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.formats.torch_file import write_torch
from mlx_afm.model import AdapterSpec, AFMConfig, ToolkitConfig, to_toolkit_config

KILLS = 50
# 83 MB: long enough to be killed in the middle.
MODEL = AFMConfig(vocab_size=8000, hidden_dim=512, num_layers=6, num_kv_reuse_layers=2, num_heads=4)
CONFIG = ToolkitConfig(model=MODEL, adapter=AdapterSpec(name="base_adapter", rank=8, alpha=4))


def toolkit_folder(folder: Path) -> Path:
    rng, state = np.random.default_rng(0), {}
    for entry in plan_names(CONFIG):
        if entry.kind is Kind.RANGE:
            state[entry.toolkit] = LazyTensor.of(np.array([-3, 3], np.float32))
        elif entry.kind is Kind.SAMPLES:
            state[entry.toolkit] = LazyTensor.of(np.array(9, np.int64))
        elif entry.kind is not Kind.ALIAS:
            state[entry.toolkit] = LazyTensor.of(rng.standard_normal(entry.shape, dtype=np.float32))
    folder.mkdir()
    write_torch(folder / "base-model.pt", state, aliases={"output_transform.weight": "embedding.weight"})
    write_json(folder / "base-model-config.json", to_toolkit_config(CONFIG))
    return folder


def start(source: Path, target: Path) -> subprocess.Popen:
    line = ["-m", "mlx_afm", "convert", "--hf-path", source, "--mlx-path", target, "--no-tokenizer"]
    return subprocess.Popen([sys.executable, *map(str, line)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_writing(process: subprocess.Popen, place: Path) -> float:
    """Returns when the first folder appears in `place`, or the process is over: at what time."""
    while process.poll() is None and not any(path.is_dir() for path in place.iterdir()):
        time.sleep(0.0005)
    return time.perf_counter()


@pytest.mark.slow
def test_killed_at_fifty_random_moments(tmp_path):
    source = toolkit_folder(tmp_path / "source")
    whole = convert(source, tmp_path / "whole", no_tokenizer=True).folder
    (tmp_path / "timed").mkdir()
    process = start(source, tmp_path / "timed" / "model")
    began = wait_for_writing(process, tmp_path / "timed")
    assert process.wait() == 0
    usual = time.perf_counter() - began
    rng, ended, interrupted = random.Random(0), 0, 0
    for number in range(KILLS):
        place = tmp_path / f"run{number}"
        place.mkdir()
        process = start(source, place / "model")
        wait_for_writing(process, place)
        time.sleep(usual * rng.uniform(0, 1.05))
        process.kill()
        process.wait()
        for folder in place.iterdir():  # the target, or a temporary folder with a name of its own
            if not folder.is_dir():
                continue  # the lock
            try:
                load(folder)
            except AFMError:
                interrupted += 1
                continue
            files = {path.relative_to(whole) for path in whole.rglob("*")}
            assert {path.relative_to(folder) for path in folder.rglob("*")} == files
            require_same_values(read_shards(whole), read_shards(folder), where=folder)
            ended += 1
    assert interrupted >= KILLS // 5, "too few were caught in the middle"
    assert ended + interrupted <= KILLS
