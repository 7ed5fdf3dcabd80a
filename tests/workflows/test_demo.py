"""The demo, whole; and an adapter on real data."""

from __future__ import annotations

import json
import os
import shutil
from itertools import islice
from pathlib import Path

import pytest

from mlx_afm import LoRAJob, TrainConfig, check_fmadapter, generate, load, score, train
from mlx_afm.errors import ConfigError
from mlx_afm.workflows.demo import ASSETS, run_demo
from mlx_afm.workflows.plot import loss_curve_svg, read_losses

DATA = Path(os.environ.get("MLX_AFM_SHARED", Path(__file__).parents[3] / "shared")) / "data"


@pytest.mark.slow
def test_the_demo_gains_thirty_points_and_ends_with_a_sound_package(tmp_path):
    said: list[str] = []
    result = run_demo(tmp_path / "out", on_step=said.append)
    assert result.exact_match_after - result.exact_match_before >= 0.3
    assert result.exact_match_fused == pytest.approx(result.exact_match_after, abs=0.02)
    assert result.package_ok
    report = check_fmadapter(result.package)
    assert (report.ok, report.fits_device) == (True, False)
    assert result.loss_curve.read_text().startswith("<svg")
    assert result.sample_answer_after != result.sample_answer_before
    assert any("«" in text for text in said), "a sample is shown with what is trained"
    assert (result.toolkit_folder / "base-model.pt").is_file()
    # The README's plain `generate`: without the system prompt that the adapter was trained with.
    for adapter in (result.adapter_folder, result.package):
        model, tokenizer = load(result.model_folder, adapter)
        assert generate(model, tokenizer, result.sample_request).strip() == result.sample_answer_after
    assert generate(*load(result.fused_folder), result.sample_request).strip() == result.sample_answer_after


def test_the_demo_does_not_write_over_anything(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_bundled_files_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 2_000_000


def test_a_loss_curve_of_few_points():
    svg = loss_curve_svg({"train": [(10, 2.0), (20, 1.0)], "eval": [(0, 3.0)]}, "t")
    assert svg.count("<polyline") == 2
    assert loss_curve_svg({"train": [], "eval": []}, "t").startswith("<svg")


def test_losses_are_read_from_metrics(tmp_path):
    lines = [{"event": "start"}, {"event": "train", "step": 5, "loss": 1.5}, {"event": "eval", "step": 0, "loss": 2}]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert read_losses(tmp_path / "m.jsonl") == {"train": [(5, 1.5)], "eval": [(0, 2.0)]}


@pytest.mark.slow
def test_an_adapter_learns_from_real_data(model_folder, tmp_path):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is missing: set MLX_AFM_SHARED")
    data = tmp_path / "data"
    data.mkdir()
    shutil.copyfile(DATA / "tldr_train.jsonl", data / "train.jsonl")  # every line is read and checked
    for split in ("valid", "test"):
        with (DATA / f"tldr_{split}.jsonl").open() as lines:
            (data / f"{split}.jsonl").write_text("".join(islice(lines, 100)))
    config = TrainConfig(iters=40, batch_size=8, learning_rate=2e-3, steps_per_eval=40)
    job = LoRAJob(model=model_folder, data=data, adapter_path=tmp_path / "adapter", train=config)
    train(job)
    losses = [loss for _, loss in read_losses(tmp_path / "adapter" / "metrics.jsonl")["eval"]]
    assert losses[-1] < 0.9 * losses[0]
    assert score(model_folder, job.adapter_path, data).loss < 0.9 * score(model_folder, None, data).loss
