"""Folders that commands write: links, the current directory, mount points, remains of killed processes, full disks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_afm.files import atomic_folder

DIES = """
import os, signal, sys
from pathlib import Path
from mlx_afm.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as partial:
    (partial / "half").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def kill_while_writing(target):
    """What a killed process leaves of a folder."""
    process = subprocess.run([sys.executable, "-c", DIES, str(target)], check=False)
    assert process.returncode == -9
    (left,) = target.parent.glob(f".{target.name}.*.part")
    return left


@pytest.fixture
def commands(toolkit_folder, model_folder, adapter_forms, data_folder):
    """Every command that makes a folder: its line, without the folder at the end."""
    return {
        "convert": ("convert", "--hf-path", toolkit_folder, "--mlx-path"),
        "to torch": ("convert", "--to", "torch", "--hf-path", model_folder, "--mlx-path"),
        "fuse": ("fuse", "--model", model_folder, "--adapter-path", adapter_forms["folder"], "--save-path"),
        "adapter": ("adapter", "convert", adapter_forms["pt"], "--model", model_folder),
        "data": ("data", "convert", data_folder),
        "fix": ("data", "check", data_folder, "--fix"),
    }


NEW = ["convert", "to torch", "fuse", "adapter", "data", "fix"]


@pytest.mark.parametrize("name", NEW)
def test_a_link_stands_for_the_folder_that_it_names(commands, name, tmp_path, cli):
    (tmp_path / "empty").mkdir()
    for target in ("empty", "missing"):
        link = tmp_path / f"to-{target}"
        link.symlink_to(tmp_path / target)
        ran = cli(*commands[name], link)
        assert ran.code == 0, ran.err
        assert link.is_symlink()
        assert names(tmp_path / target)
    assert names(tmp_path) == ["empty", "missing", "to-empty", "to-missing"]


@pytest.mark.parametrize("name", NEW)
def test_the_current_directory_is_refused_before_anything_is_computed(commands, name, tmp_path, cli, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ran = cli(*commands[name], ".")
    assert ran.code == 1
    assert "the current directory cannot be replaced" in ran.err
    assert "such as new." in ran.err
    assert names(tmp_path) == ["here"]
    assert names(tmp_path / "here") == []
    assert cli(*commands[name], "new").code == 0


@pytest.mark.parametrize("name", NEW)
def test_a_mount_point_is_refused_before_anything_is_computed(commands, name, tmp_path, cli, monkeypatch):
    (tmp_path / "disk").mkdir()
    plain = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk" or plain(path))
    ran = cli(*commands[name], tmp_path / "disk")
    assert ran.code == 1
    assert f"{tmp_path / 'disk'}: a mount point cannot be replaced" in ran.err
    assert names(tmp_path) == ["disk"]
    assert names(tmp_path / "disk") == []
    assert cli(*commands[name], tmp_path / "disk" / "new").code == 0


@pytest.mark.parametrize("kind", ["link", "dangling", ".", "mount"])
def test_a_run_trains_in_any_of_these(model_folder, data_folder, tmp_path, cli, monkeypatch, kind):
    place = tmp_path / "place"
    if kind != "dangling":
        place.mkdir()
    given = place
    if kind in ("link", "dangling"):
        given = tmp_path / "link"
        given.symlink_to(place)
    elif kind == ".":
        monkeypatch.chdir(place)
        given = "."
    else:  # the root of a disk, in a folder that the user may not write
        plain = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and plain(path, mode))
    line = ("--train", "--model", model_folder, "--data", data_folder, "--iters", 1, "--rank", 4)
    ran = cli("lora", *line, "--adapter-path", given)
    assert ran.code == 0, ran.err
    expected = {"adapter_config.json", "adapters.safetensors", "best", "metrics.jsonl", "training_state.safetensors"}
    assert set(names(place)) == expected
    assert set(names(tmp_path)) == {"place", "link"} if kind in ("link", "dangling") else {"place"}


def test_split_data_goes_through_a_link_and_into_the_current_directory(data_folder, tmp_path, cli, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    line = ("data", "split", data_folder / "train.jsonl", "--valid", 0.2, "--test", 0.2, "--out")
    assert cli(*line, tmp_path / "link").code == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli(*line, ".").code == 0
    assert names(tmp_path / "there") == names(tmp_path / "here") == ["test.jsonl", "train.jsonl", "valid.jsonl"]


def test_a_package_is_written_through_a_link(adapter_forms, tmp_path, cli):
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    assert cli("export", "--adapter-path", adapter_forms["folder"], "--name", "x", "--output-dir",
               tmp_path / "link").code == 0  # fmt: skip
    assert names(tmp_path / "kept") == ["x.fmadapter"]


# ---- what killed processes leave ----


@pytest.mark.parametrize("name", NEW)
def test_the_remains_of_killed_processes_are_named_and_removed(commands, name, tmp_path, cli):
    left = [kill_while_writing(tmp_path / target) for target in ("target", "another")]
    ran = cli(*commands[name], tmp_path / "target")
    assert ran.code == 0
    for path in left:
        assert f"removed {path} (0.00 MB), the unfinished output of a killed process\n" in ran.err
    assert names(tmp_path) == ["target"]


def test_what_a_living_process_writes_and_what_is_not_ours_stays(toolkit_folder, tmp_path, cli):
    (tmp_path / ".notes.part").mkdir()
    (tmp_path / ".notes.abcdefgh.parts").write_text("mine")
    (tmp_path / "notes.abcdefgh.part").write_text("mine")
    with atomic_folder(tmp_path / "slow") as partial:
        ran = cli("convert", "--hf-path", toolkit_folder, "--mlx-path", tmp_path / "quick")
        assert ran.code == 0
        assert "removed" not in ran.err
        assert partial.is_dir()
    assert names(tmp_path) == [".notes.abcdefgh.parts", ".notes.part", "notes.abcdefgh.part", "quick", "slow"]


def test_a_folder_that_a_killed_process_moved_aside_comes_back(adapter_forms, tmp_path, cli):
    """Killed between the two renames that replace a package."""
    line = ("export", "--adapter-path", adapter_forms["folder"], "--output-dir", tmp_path, "--name")
    assert cli(*line, "box").code == 0
    (tmp_path / "box.fmadapter").rename(tmp_path / ".box.fmadapter.abcdefgh.part.old")
    (tmp_path / ".box.fmadapter.abcdefgh.part").mkdir()
    ran = cli(*line, "other")
    assert ran.code == 0
    assert f"put back {tmp_path / 'box.fmadapter'}" in ran.err
    assert names(tmp_path) == ["box.fmadapter", "other.fmadapter"]
    assert cli("check", tmp_path / "box.fmadapter").code == 0


# ---- a full disk ----


@pytest.mark.parametrize("name", NEW[:-1])  # the last one writes without syncing
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(commands, name, tmp_path, cli, full_disk):
    with full_disk():
        ran = cli(*commands[name], tmp_path / "target")
    assert ran.code == 1
    message = ran.err.partition("mlx-afm: ")[2]
    assert message.startswith(f"{tmp_path / 'target'}")
    assert "not enough disk space (expected " in message
    assert message.endswith(". Free some space, or choose a target on another disk.\n")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["convert", "to torch", "fuse"])
def test_two_processes_do_not_write_one_folder(commands, name, tmp_path, cli):
    from mlx_afm.folders import lock_folder

    with lock_folder(tmp_path / "target"):
        ran = cli(*commands[name], tmp_path / "target")
    assert ran.code == 1
    assert f"{tmp_path / 'target'}: another process is writing this folder" in ran.err
    assert names(tmp_path) == []


def test_two_processes_do_not_write_one_file_of_answers(model_folder, tmp_path, cli):
    from mlx_afm.folders import lock_folder

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "list all"}\n')
    line = ("generate", "--model", model_folder, "--prompt", tmp_path / "prompts.jsonl", "-m", 2, "--output")
    with lock_folder(tmp_path / "answers.jsonl"):
        ran = cli(*line, tmp_path / "answers.jsonl")
    assert ran.code == 1
    assert f"{tmp_path / 'answers.jsonl'}: another process is writing this file" in ran.err
    assert cli(*line, tmp_path / "answers.jsonl").code == 0
    assert names(tmp_path) == ["answers.jsonl", "prompts.jsonl"]
