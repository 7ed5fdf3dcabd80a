"""Folders that several processes write at the same time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlx_afm.files import atomic_folder

WRITER = """
import sys
from pathlib import Path
from mlx_afm.files import atomic_folder
for number in range(int(sys.argv[2])):
    with atomic_folder(Path(sys.argv[1])) as folder:
        for name in "abc":
            (folder / name).write_text(sys.argv[3])
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_several_processes_replace_one_folder(tmp_path):
    target = tmp_path / "target"
    command = [sys.executable, "-c", WRITER, str(target), "150"]
    processes = [subprocess.Popen([*command, word]) for word in ("one", "two", "three")]
    try:
        assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert names(tmp_path) == ["target"]
    assert names(target) == ["a", "b", "c"]
    assert len({(target / name).read_text() for name in "abc"}) == 1, "all of one process"


def test_what_cannot_be_replaced_stays(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="director"), atomic_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "kept"
    assert names(tmp_path) == ["file"]


def test_a_link_to_a_folder_stays_and_the_folder_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with atomic_folder(tmp_path / "link") as partial:
        (partial / "new").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "folder") == ["new"]
    assert names(tmp_path) == ["folder", "link"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").write_text("kept")
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "target") as partial:
        partial.rmdir()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "target"):
        raise ZeroDivisionError
    assert (tmp_path / "target" / "old").read_text() == "kept"
