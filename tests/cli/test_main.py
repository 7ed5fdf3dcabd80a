import errno
import json
import os
import re
import subprocess
import sys
from importlib import import_module

import click
import pytest

from mlx_afm import __version__
from mlx_afm_cli.main import COMMANDS, group, main


def leaves(command, name):
    """Commands that do something, by their full name."""
    if isinstance(command, click.Group):
        for inner in command.list_commands(click.Context(command)):
            yield from leaves(command.get_command(click.Context(command), inner), f"{name} {inner}".strip())
    else:
        yield name, command


LEAVES = dict(leaves(group, ""))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_lives_in_the_module_of_its_name(name):
    assert import_module(f"mlx_afm_cli.{name}_command").command.name == name


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_has_json_and_described_options(name, cli):
    ran = cli(*name.split(), "--help")
    assert ran.code == 0
    assert "--json" in ran.out
    assert ran.err == ""
    assert LEAVES[name].help


def test_version(cli):
    assert cli("--version").out.strip() == f"mlx-afm, version {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["convert"],
        ["convert", "--hf-path", "x", "--bits", "4"],
        ["convert", "--hf-path", "x", "--to", "coreml"],
        ["convert", "--hf-path", "x", "--dtype", "int8"],
        ["generate", "--model", "x", "--prompt", "y", "--max-tokens", "many"],
        ["inspect"],
        ["lora", "--model", "x", "--data", "y"],
        ["lora", "--train"],
        ["lora", "--train", "--model", "x", "--data", "y", "--schedule", "steep"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_and_says_how_it_goes(arguments, cli):
    ran = cli(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert "Usage: " in ran.err
    assert "Error: " in ran.err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (BrokenPipeError, 0)])
def test_an_interruption_is_no_traceback(error, code, monkeypatch, capsys):
    def interrupt(*arguments, **settings):
        raise error

    monkeypatch.setattr(group, "main", interrupt)
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def python_m(*arguments, stdin=b""):
    command = [sys.executable, "-m", "mlx_afm", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120)


def test_as_a_program_results_and_progress_are_apart(toolkit_folder, tmp_path):
    ran = python_m("convert", "--hf-path", toolkit_folder, "--mlx-path", tmp_path / "out", "--json")
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["folder"] == str(tmp_path / "out")
    assert ran.stdout.count(b"\n") == 1
    assert b"converting 0.00 of 0.00 GB" in ran.stderr


def test_as_a_program_an_error_is_one_message(tmp_path):
    ran = python_m("inspect", tmp_path / "nothing")
    assert (ran.returncode, ran.stdout) == (1, b"")
    assert ran.stderr.decode() == f"mlx-afm: {tmp_path / 'nothing'}: no such file or folder\n"


def test_as_a_program_it_reads_stdin_and_answers(model_folder, adapter_forms, say):
    adapter = ("--adapter-path", adapter_forms["fmadapter"])
    ran = python_m(
        "generate", "--model", model_folder, "--prompt", "-", "-m", 8, *adapter, stdin="größer\nals".encode()
    )
    assert ran.returncode == 0
    assert ran.stdout.decode() == say(*adapter, prompt="größer\nals")["text"] + "\n"
    assert ran.stderr == b""


def test_sizes_are_in_gb(cli, model_folder, data_folder, tmp_path):
    line = ["lora", "--train", "--model", model_folder, "--data", data_folder, "--adapter-path", tmp_path / "a"]
    ran = cli(*line, "--iters", 1, "--batch-size", 2, "--steps-per-report", 1, "--no-cache")
    assert ran.code == 0
    assert re.search(r"step 1/1 .*  peak \d+\.\d\d GB  ", ran.err)
    assert "GiB" not in ran.err


def test_a_full_disk_is_said_with_what_to_do(cli, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mlx_afm.workflows.inspect.inspect", fail)
    ran = cli("inspect", "x")
    assert ran.code == 1
    assert "the operating system reports: No space left on device. Free some space" in ran.err


def test_a_name_of_bytes_that_are_no_text(cli, tmp_path):
    ran = cli("inspect", os.fsdecode(bytes(tmp_path) + b"/\xff"))
    assert ran.code == 1
    assert "no such file or folder" in ran.err


def test_ctrl_c_while_the_first_modules_are_imported_is_one_line(tmp_path):
    """A stand-in for click, the first library that is imported, sends the signal at a known moment."""
    listen = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background jobs ignore it
    (tmp_path / "click.py").write_text(f"import os, signal\n{listen}\nos.kill(os.getpid(), signal.SIGINT)\n")
    line = [sys.executable, "-m", "mlx_afm", "--version"]
    ran = subprocess.run(
        line, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "mlx-afm: interrupted\n")
