"""Places, conversion and training of the toolkit's commands."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from mlx_afm.errors import ConfigError
from mlx_afm.formats.safetensors_file import read_safetensors
from mlx_afm.formats.torch_file import read_torch
from mlx_afm.training import Evaluated, StepsReported
from mlx_afm.workflows import toolkit_train
from mlx_afm.workflows.lora import train
from mlx_afm.workflows.toolkit import MADE_FROM, PRECISIONS, find_assets, model_folder
from mlx_afm.workflows.toolkit_train import ToolkitTraining, train_adapter


@pytest.fixture
def assets(toolkit_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AFM_CACHE", str(tmp_path / "cache"))
    for name in ("MLX_AFM_TOOLKIT_ASSETS", "MLX_AFM_TOOLKIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return shutil.copytree(toolkit_folder, tmp_path / "toolkit" / "assets")


def test_assets_are_where_said_else_named_else_here(assets, tmp_path, monkeypatch):
    monkeypatch.chdir(assets.parent)
    assert find_assets(None).resolve() == assets
    (tmp_path / "named").mkdir()
    monkeypatch.setenv("MLX_AFM_TOOLKIT_ASSETS", str(tmp_path / "named"))
    assert find_assets(None) == tmp_path / "named"
    assert find_assets(assets) == assets
    with pytest.raises(ConfigError, match="no assets"):
        find_assets(tmp_path / "missing")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_is_the_dtype_of_the_base(precision, assets, tmp_path):
    folder = model_folder(assets, precision)
    assert folder.name == PRECISIONS[precision].dtype
    assert folder.parent.parent == tmp_path / "cache" / "toolkit"
    assert [path.name for path in assets.parent.iterdir()] == ["assets"]  # nothing beside the assets
    dtypes = {tensor.dtype for tensor in read_safetensors(folder / "model.safetensors").values()}
    assert PRECISIONS[precision].dtype in dtypes
    adapter = read_safetensors(folder / "base_adapter" / "adapters.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {"float32"}


def test_the_model_is_converted_once_and_again_when_it_changed(assets):
    notes = []
    folder = model_folder(assets, "f32", on_note=notes.append)
    assert len(notes) == 1
    assert str(folder) in notes[0]
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert model_folder(assets, "f32", on_note=notes.append) == folder
    assert len(notes) == 1
    os.utime(assets / "base-model.pt", ns=(1, 1))
    model_folder(assets, "f32", on_note=notes.append)
    assert len(notes) == 2
    assert (folder / "model.safetensors").stat().st_mtime_ns != stamp
    (folder / MADE_FROM).unlink()  # as after being killed between the two
    model_folder(assets, "f32", on_note=notes.append)
    assert len(notes) == 3


def test_a_model_that_an_earlier_release_put_beside_the_assets_is_used(assets):
    made = model_folder(assets, "f32")
    shutil.move(made, assets.parent / "mlx-afm" / "float32")
    assert model_folder(assets, "f32", on_note=pytest.fail) == assets.parent / "mlx-afm" / "float32"


def test_the_place_can_be_chosen_and_others_files_are_left_alone(assets, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AFM_TOOLKIT_CACHE", str(tmp_path / "elsewhere"))
    assert model_folder(assets, "f32") == tmp_path / "elsewhere" / "float32"
    mine = tmp_path / "elsewhere" / "bfloat16" / "mine"
    mine.mkdir(parents=True)
    with pytest.raises(ConfigError, match="in the way"):
        model_folder(assets, "bf16")
    assert mine.exists()


@pytest.fixture
def settings(assets, data_folder, tmp_path):
    data = tmp_path / "lines.jsonl"
    lines = (data_folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ToolkitTraining(
        model=model_folder(assets, "f32"), train_data=data, eval_data=data_folder / "valid.jsonl",
        checkpoint_dir=tmp_path / "out", epochs=3, batch_size=4, warmup_epochs=2, loss_update_frequency=1,
    )  # fmt: skip


def never():
    return False


def test_leaving_at_epochs_changes_nothing(settings, tmp_path):
    """The checkpoints of epochs are states of the one run that is never left."""
    events = []
    train_adapter(settings, events.append, never)
    job = toolkit_train._job(replace(settings, checkpoint_dir=tmp_path / "whole"))
    job = replace(job, train=replace(job.train, warmup=6.0))
    whole = []
    train(job, on_event=whole.append)
    ours = read_torch(settings.checkpoint_dir / "adapter-final.pt")
    wanted = read_safetensors(job.adapter_path / "adapters.safetensors")
    assert len(ours) == len(wanted)
    for found, tensor in zip(ours.values(), wanted.values()):
        np.testing.assert_array_equal(found.read_values(), tensor.read_values())

    def reports(told):
        return [(e.step, e.loss, e.learning_rate) for e in told if isinstance(e, StepsReported)]

    assert reports(events) == reports(whole)
    assert [rate for _, _, rate in reports(events)][:6] == pytest.approx([1e-3 * n / 6 for n in range(1, 7)])


def test_the_best_two_epochs_are_kept(settings, monkeypatch):
    losses = {3: 1.0, 6: 3.0, 9: 2.0, 12: 0.5}
    told = []

    def handle(leg, event):
        told.append(event)
        if isinstance(event, Evaluated) and event.step == leg.end:
            leg.evaluated = losses[event.step]

    monkeypatch.setattr(toolkit_train._Leg, "handle", handle)
    train_adapter(replace(settings, epochs=4), told.append, never)
    names = {path.name for path in settings.checkpoint_dir.glob("*.pt")}
    assert names == {"adapter-final.pt", "adapter-epoch1.pt", "adapter-epoch4.pt"}
    final, last = (read_torch(settings.checkpoint_dir / f"adapter-{name}.pt") for name in ("final", "epoch4"))
    assert all(np.array_equal(final[name].read_values(), last[name].read_values()) for name in final)
    assert not [path for path in settings.checkpoint_dir.iterdir() if path.name.startswith(".")]


def test_an_interrupted_run_keeps_what_it_saved(settings):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 5

    trained = train_adapter(settings, lambda event: None, stop)
    assert trained.interrupted
    assert {path.name for path in settings.checkpoint_dir.glob("*.pt")} == {"adapter-final.pt", "adapter-epoch1.pt"}


def test_the_run_beside_the_checkpoints_names_the_users_files(settings):
    train_adapter(replace(settings, epochs=1, eval_data=None), lambda event: None, never)
    run = settings.checkpoint_dir / "mlx-afm"
    assert (run / "data" / "train.jsonl").resolve() == settings.train_data.resolve()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["start", "train", "train", "train", "end"]
