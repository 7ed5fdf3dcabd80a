"""Reports to other programs, through stand-ins for their libraries."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

import mlx_afm
from mlx_afm import LoRAConfig, LoRAJob, TrainConfig
from mlx_afm.errors import ConfigError, MissingDependencyError
from mlx_afm.runs.reports import open_reports, require_reports


class FakeRun:
    def __init__(self, **settings):
        self.settings, self.logged, self.finished = settings, [], 0

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def libraries(monkeypatch):
    """All three, each remembering its runs."""
    runs = {"wandb": [], "swanlab": [], "tensorboard": []}

    def library(name):
        module = ModuleType(name)
        module.init = lambda **settings: runs[name].append(FakeRun(**settings)) or runs[name][-1]
        monkeypatch.setitem(sys.modules, name, module)

    def writer(folder):
        run = SimpleNamespace(folder=folder, logged=[], finished=0)
        run.add_scalar = lambda name, value, step: run.logged.append((step, name, value))
        run.close = lambda: setattr(run, "finished", run.finished + 1)
        runs["tensorboard"].append(run)
        return run

    library("wandb")
    library("swanlab")
    board = ModuleType("tensorboardX")
    board.SummaryWriter = writer
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    return runs


@pytest.fixture
def job(model_folder, data_folder, tmp_path):
    config = TrainConfig(iters=2, steps_per_report=1)
    return LoRAJob(
        model=model_folder, data=data_folder, adapter_path=tmp_path / "run", train=config, lora=LoRAConfig(rank=2),
        report_to=("wandb", "swanlab", "tensorboard"), project_name="mine",
    )  # fmt: skip


def test_all_of_them_are_told(job, libraries):
    result = mlx_afm.train(job)
    wandb, swanlab, board = (libraries[name][0] for name in ("wandb", "swanlab", "tensorboard"))
    assert wandb.settings["project"] == swanlab.settings["project"] == "mine"
    assert wandb.settings["config"]["train"]["iters"] == 2
    assert wandb.logged == swanlab.logged
    assert [step for step, _ in wandb.logged] == [0, 1, 2, 2, 2]
    assert [name for step, values in wandb.logged for name in values if name.endswith("/loss")] == [
        "valid/loss", "train/loss", "train/loss", "valid/loss",
    ]  # fmt: skip
    assert wandb.logged[-1][1]["run/best_loss"] == result.best_loss
    assert {(step, name, value) for step, values in wandb.logged for name, value in values.items()} == set(board.logged)
    assert board.folder == str(job.adapter_path / "tensorboard")
    assert [run.finished for run in (wandb, swanlab, board)] == [1, 1, 1]


def test_they_are_closed_when_something_fails(tmp_path, libraries):
    def fail():
        with open_reports(("wandb", "tensorboard"), "p", tmp_path, {}):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert libraries["wandb"][0].finished == libraries["tensorboard"][0].finished == 1


@pytest.mark.parametrize(("name", "module"), [("wandb",) * 2, ("swanlab",) * 2, ("tensorboard", "tensorboardX")])
def test_what_is_not_installed_is_found_before_anything_is_read(job, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=f"--report-to {name} needs {module}.*pip install {module}"):
        mlx_afm.train(replace(job, report_to=(name,)))
    assert not job.adapter_path.exists()


def test_an_unknown_report():
    with pytest.raises(ConfigError, match=r"unknown report \(expected some of wandb, swanlab, tensorboard, found mlf"):
        require_reports(("wandb", "mlf"))
