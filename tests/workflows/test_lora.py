"""Training as a whole job: where it starts, what it writes, what it scores."""

from __future__ import annotations

import json
import math

import mlx.core as mx
import numpy as np
import pytest

import mlx_afm
from mlx_afm import LoRAConfig, LoRAJob, TrainConfig
from mlx_afm.adapters import adapter_weights, read_adapter, write_adapter_folder
from mlx_afm.errors import ConfigError
from mlx_afm.model_folder import ModelFolder
from mlx_afm.runs.start import start_adapter

SHORT = TrainConfig(iters=6, batch_size=4, learning_rate=3e-3, steps_per_eval=2, save_every=2, steps_per_report=2)


@pytest.fixture(scope="module")
def trained(model_folder, data_folder, tmp_path_factory):
    job = LoRAJob(
        model=model_folder, data=data_folder, adapter_path=tmp_path_factory.mktemp("run") / "adapter", train=SHORT
    )
    return job, mlx_afm.train(job)


def test_last_and_best_adapter_and_metrics_are_written(trained):
    job, result = trained
    assert result.steps == 6
    events = [json.loads(line) for line in (job.adapter_path / "metrics.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "eval", *["train", "eval"] * 3, "end"]
    losses = [event["loss"] for event in events if event["event"] == "eval"]
    assert result.best_loss == min(losses) < losses[0]
    last, best = read_adapter(job.adapter_path), read_adapter(job.adapter_path / "best")
    assert last.config == best.config == LoRAConfig()
    settings = json.loads((job.adapter_path / "adapter_config.json").read_text())
    assert settings["train"]["learning_rate"] == 3e-3
    assert set(settings["data"]) == {"train", "valid", "test"}
    assert not [path for path in job.adapter_path.rglob("*") if path.name.endswith(".part")]


def test_the_trained_adapter_loads_back_with_the_loss_it_had(trained):
    job, result = trained
    valid = mlx_afm.score(job.model, job.adapter_path / "best", job.data / "valid.jsonl", batch_size=4)
    assert valid.loss == pytest.approx(result.best_loss, rel=1e-5)
    assert valid.perplexity == pytest.approx(math.exp(valid.loss))
    assert valid.examples == 4
    test = mlx_afm.score(job.model, job.adapter_path, job.data)
    base = mlx_afm.score(job.model, None, job.data)
    assert test.loss < base.loss
    assert test.tokens == base.tokens


def test_training_starts_from_the_tensors_in_the_checkpoint(model_folder):
    model = ModelFolder(model_folder).load_model()
    start_adapter(model, ModelFolder(model_folder), LoRAConfig(), seed=7)
    base = read_adapter(model_folder / "base_adapter")
    weights = adapter_weights(model)
    assert all(np.array_equal(np.array(weights[name]), tensor.read_values()) for name, tensor in base.weights.items())


def test_untrained_targets_keep_the_checkpoints_tensors(model_folder, data_folder, tmp_path):
    job = LoRAJob(
        model=model_folder, data=data_folder, adapter_path=tmp_path / "a", train=TrainConfig(iters=2),
        lora=LoRAConfig(targets=("q", "v")),
    )  # fmt: skip
    mlx_afm.train(job)
    adapter, base = read_adapter(job.adapter_path), read_adapter(model_folder / "base_adapter")
    assert adapter.config.targets == LoRAConfig().targets, "an adapter that carries all projections"
    changed = {
        name
        for name, tensor in adapter.weights.items()
        if not np.array_equal(tensor.read_values(), base.weights[name].read_values())
    }
    assert changed
    assert all(".q." in name or ".v." in name or "q_proj" in name for name in changed)


def test_another_rank_starts_afresh_when_the_base_adapter_does_nothing(model_folder):
    model = ModelFolder(model_folder).load_model()
    form = start_adapter(model, ModelFolder(model_folder), LoRAConfig(rank=8, scale=2.0, targets=("o",)), seed=0)
    assert (form.rank, form.scale, form.targets) == (8, 2.0, ("o",))
    assert all("out_proj" in name for name in adapter_weights(model))


def test_an_active_base_adapter_of_another_form_is_part_of_the_model(model_folder, adapter_forms, copy_of):
    folder = copy_of(model_folder)
    write_adapter_folder(folder / "base_adapter", read_adapter(adapter_forms["folder"]))
    plain, _ = mlx_afm.load(model_folder)
    active, _ = mlx_afm.load(folder)
    tokens = mx.arange(3, 20)[None]
    assert not mx.allclose(plain(tokens), active(tokens))
    with pytest.raises(ConfigError, match=r"active adapter \(expected rank 32, scale 0.5, found rank 8"):
        start_adapter(ModelFolder(folder).load_model(), ModelFolder(folder), LoRAConfig(rank=8), seed=0)
    start_adapter(ModelFolder(folder).load_model(), ModelFolder(folder), LoRAConfig(), seed=0)


def test_the_same_job_gives_the_same_adapter(trained, tmp_path):
    job, _ = trained
    again = LoRAJob(model=job.model, data=job.data, adapter_path=tmp_path / "again", train=SHORT)
    mlx_afm.train(again)
    first, second = read_adapter(job.adapter_path), read_adapter(again.adapter_path)
    assert all(np.array_equal(first.weights[name].read_values(), t.read_values()) for name, t in second.weights.items())
