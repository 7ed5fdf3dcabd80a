"""A float16 base with float32 adapters stays finite on real data."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_afm
from mlx_afm import LoRAJob, TrainConfig
from mlx_afm.workflows.convert import convert

SHARED = Path(os.environ.get("MLX_AFM_SHARED", Path(__file__).parents[3] / "shared"))
TLDR = SHARED / "data" / "tldr_train.jsonl"
STEPS = 200


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_two_hundred_steps_on_tldr(dtype, toolkit_folder, tmp_path):
    if not TLDR.is_file():
        pytest.skip(f"{TLDR} is missing: set MLX_AFM_SHARED")
    lines = sorted(TLDR.read_text(encoding="utf-8").splitlines(), key=len)[: 2 * STEPS]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder = convert(toolkit_folder, tmp_path / "model", dtype=dtype).folder
    config = TrainConfig(iters=STEPS, batch_size=2, learning_rate=1e-3, steps_per_report=1)
    job = LoRAJob(model=folder, data=tmp_path / "train.jsonl", adapter_path=tmp_path / "a", train=config, cache=None)
    mlx_afm.train(job)
    events = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    reports = [event for event in events if event["event"] == "train"]
    losses = [event["loss"] for event in reports]
    assert len(losses) == STEPS
    assert all(loss is not None and math.isfinite(loss) for loss in losses)
    assert all(math.isfinite(event["gradient_norm"]) for event in reports)
    assert reports[-1]["skipped_steps"] == 0
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    weights = mx.load(str(tmp_path / "a" / "adapters.safetensors"))
    assert all(array.dtype == mx.float32 and mx.isfinite(array).all().item() for array in weights.values())
