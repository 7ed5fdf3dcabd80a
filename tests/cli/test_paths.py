"""Paths: `~` is the home folder wherever a path is given, and every public function takes str and Path."""

import dataclasses
import inspect
import json
import os
import shutil
from importlib import import_module
from pathlib import Path

import click
import pytest

import mlx_afm
from mlx_afm.adapters import read_adapter
from mlx_afm.errors import SettingError
from mlx_afm.files import to_path
from mlx_afm.serving import ServeConfig, find_adapters, running
from mlx_afm_cli.main import group
from mlx_afm_cli.parameters import PathType

PACKAGES = ("adapters", "data", "generation", "serving", "training", "model", "quant", "text")
JOBS = {
    "LoRAJob": {"model": "~/m", "data": "~/d", "adapter_path": "~/a", "cache": "~/c", "resume_adapter_file": "~/r"},
    "ExportConfig": {"adapter": "~/a", "name": "box", "output_dir": "~/o", "model": "~/m", "toolkit": "~/t"},
    "CheckConfig": {"package": "~/p", "expect": "~/e", "model": "~/m", "toolkit": "~/t"},
    "Calibration": {"data": "~/d"},
}


@pytest.fixture
def home(tmp_path, monkeypatch, model_folder, data_folder, adapter_forms):
    """A home folder with a model, data and an adapter, and another current folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, source in {"afm": model_folder, "data": data_folder, "adapter": adapter_forms["folder"]}.items():
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def test_a_tilde_in_a_text_is_the_home_folder(home):
    assert to_path("~/afm") == home / "afm"
    assert to_path(Path("~/afm")) == home / "afm"
    assert to_path("a~b/~") == Path("a~b/~")
    assert to_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")  # as a shell leaves it
    for wrong in ("", "a\0b", 3, None):
        with pytest.raises(SettingError, match="not a path"):
            to_path(wrong)


def test_a_tilde_after_an_equals_sign(home, cli):
    ran = cli("convert", "--hf-path=~/afm", "--mlx-path=~/copy", "--dtype", "bfloat16", "--json")
    assert ran.json["folder"] == str(home / "copy")
    assert (home / "copy" / "config.json").is_file()
    assert not list((home / "cwd").iterdir())
    line = ["generate", "--model=~/afm", "--adapter-path=~/adapter", "--prompt", "hello", "-m", "1", "--json"]
    assert cli(*line).json["generation_tokens"] == 1


def test_a_tilde_in_name_and_path_and_in_a_file_of_prompts(home, cli):
    chat = cli("chat", "--model=~/afm", "--adapter", "box=~/adapter", "-m", "1", stdin=b"/adapter box\nhello\n")
    assert (chat.code, "(adapter in use: box)" in chat.err) == (0, True)
    (home / "q.jsonl").write_text('{"prompt": "hello"}\n')
    ran = cli("generate", "--model=~/afm", "--prompt=~/q.jsonl", "--output=~/answers.jsonl", "-m", "1")
    assert ran.code == 0, ran.err
    assert (home / "answers.jsonl").is_file()
    assert not list((home / "cwd").iterdir())


def test_a_tilde_in_yaml(home, cli):
    (home / "run.yaml").write_text("model: ~/afm\ndata: ~/data\nadapter_path: ~/run\niters: 1\nbatch_size: 2\n")
    assert cli("lora", "--train", "--config=~/run.yaml", "--no-cache").code == 0
    assert (home / "run" / "adapters.safetensors").is_file()
    assert not list((home / "cwd").iterdir())


def _options(command, path=()):
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            yield from _options(command.get_command(None, name), (*path, name))
    else:
        yield from ((" ".join(path), parameter) for parameter in command.params)


def test_no_option_reads_a_path_in_a_way_of_its_own():
    """A default that is a path, or a help text that says file or folder, belongs to an option of the one type."""
    other = [
        f"{command} {parameter.name}"
        for command, parameter in _options(group)
        if isinstance(parameter.default, Path) and not isinstance(parameter.type, PathType)
    ]
    assert other == []
    arguments = {parameter.name for _, parameter in _options(group) if isinstance(parameter, click.Argument)}
    plain = [p.name for _, p in _options(group) if isinstance(p, click.Argument) and not isinstance(p.type, PathType)]
    assert arguments
    assert plain == ["arguments", "names"]  # of the one command that is refused; of entries of the cache


@pytest.mark.parametrize("name", JOBS)
def test_settings_take_str_and_expand_it(name, home):
    config = getattr(mlx_afm, name)(**JOBS[name])
    for field, text in JOBS[name].items():
        if text.startswith("~"):
            assert getattr(config, field) == home / text[2:]
    wrong = {**JOBS[name], next(field for field, text in JOBS[name].items() if text.startswith("~")): ""}
    with pytest.raises(SettingError, match="not a path"):
        getattr(mlx_afm, name)(**wrong)


def test_every_public_settings_class_with_paths_is_tried_above():
    with_paths = {
        name
        for name in mlx_afm.__all__
        if dataclasses.is_dataclass(member := getattr(mlx_afm, name))
        and member.__dataclass_params__.frozen
        and any(field.kw_only and "Path" in str(field.type) for field in dataclasses.fields(member))
    }
    assert with_paths - {"RecoverJob"} == set(JOBS)
    job = mlx_afm.LoRAJob(**JOBS["LoRAJob"])
    teacher = mlx_afm.RecoverJob(run=job, teacher="~/t").teacher
    assert teacher == Path(os.environ["HOME"]) / "t"


def _public_functions():
    for package in ("", *PACKAGES):
        module = import_module(f"mlx_afm.{package}".rstrip("."))
        for name in getattr(module, "__all__", ()):
            if inspect.isfunction(member := getattr(module, name)):
                yield f"{module.__name__}.{name}", member


def test_every_public_function_says_that_it_takes_str():
    wrong = [
        f"{name}({parameter.name}: {parameter.annotation})"
        for name, function in _public_functions()
        for parameter in inspect.signature(function).parameters.values()
        if "Path" in str(parameter.annotation) and "str" not in str(parameter.annotation)
    ]
    assert wrong == []


def test_what_failed_with_str_works(home, cli):
    """The calls that the README shows, with texts for paths."""
    job = mlx_afm.LoRAJob(model="~/afm", data="~/data", adapter_path="~/run", cache=None,
                          train=mlx_afm.TrainConfig(iters=1, batch_size=2, steps_per_report=1))  # fmt: skip
    trained = mlx_afm.train(job)
    assert trained.adapter_path == home / "run"
    scored = mlx_afm.score("~/afm", "~/run", "~/data")
    assert scored.examples == 4
    assert "training" in mlx_afm.plot(["~/run"], "~/loss.svg")
    assert (home / "loss.svg").is_file()
    assert read_adapter("~/run").config.rank == 32
    assert set(find_adapters("~")) >= {"run", "adapter"}
    exported = mlx_afm.export_package(mlx_afm.ExportConfig(adapter="~/run", name="box", output_dir="~/out"))
    assert exported.package == home / "out" / "box.fmadapter"
    assert mlx_afm.check_fmadapter("~/out/box.fmadapter").package == exported.package
    assert mlx_afm.inspect("~/afm")["kind"] == "MLX model folder"
    assert mlx_afm.convert_adapter("~/run", "~/run.pt") == home / "run.pt"
    assert mlx_afm.fuse("~/afm", "~/run", "~/fused").folder == home / "fused"
    model, _ = mlx_afm.load("~/afm", "~/run.pt")
    assert model is not None
    with running("~/afm", {"box": "~/adapter"}, ServeConfig(port=0, admin_roots=("~",))) as server:
        assert server.models == ("afm", "box")
    assert json.loads((home / "run" / "adapter_config.json").read_text())["model"] == str(home / "afm")
