"""Locks on folders, and what killed processes leave in them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from filelock import FileLock

from mlx_afm.errors import ConfigError
from mlx_afm.files import atomic_file, atomic_folder
from mlx_afm.folders import INNER_LOCK, is_empty, lock_folder, remove_stale

HOLDER = """
import sys
from pathlib import Path
from mlx_afm.folders import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the folder `deep/target`."""
    line = [sys.executable, "-c", HOLDER, str(tmp_path / "deep" / "target")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_lock_is_for_one_process_and_leaves_nothing(tmp_path, holder):
    target = tmp_path / "deep" / "target"
    with pytest.raises(ConfigError, match="another process is writing this folder"), lock_folder(target):
        pass
    with lock_folder(target.parent / "other"):
        pass
    holder.communicate("")
    assert names(tmp_path) == [], "the lock, and the folder that was made for it"


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert names(tmp_path / "deep") == [".target.lock"]
    with lock_folder(tmp_path / "deep" / "target"):
        pass
    assert names(tmp_path / "deep") == []


def test_one_process_cannot_take_a_lock_twice(tmp_path):
    with lock_folder(tmp_path / "a"):
        with pytest.raises(ConfigError, match="another process"), lock_folder(tmp_path / "a"):
            pass
        with pytest.raises(ConfigError, match="another process"), lock_folder(tmp_path / "a"):
            pass
    with lock_folder(tmp_path / "a"):
        assert names(tmp_path) == [".a.lock"]


def test_a_folder_with_a_lock_in_it_is_empty(tmp_path):
    (tmp_path / INNER_LOCK).touch()
    assert is_empty(tmp_path)
    (tmp_path / "other").touch()
    assert not is_empty(tmp_path)
    assert not is_empty(tmp_path / "other")


def test_only_what_no_process_holds_is_stale(tmp_path):
    (tmp_path / ".dead.abcd_123.part").mkdir()
    (tmp_path / ".dead.json.abcd_123.part").write_text("half")
    notes = []
    with atomic_folder(tmp_path / "folder") as first, atomic_file(tmp_path / "file") as second:
        remove_stale(tmp_path, notes.append)
        assert first.is_dir()
        assert second.is_file()
    assert names(tmp_path) == ["file", "folder"]
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("number", "says"), [(errno.EROFS, "cannot write here: Read-only"), (errno.ENOSPC, "disk space")]
)
def test_a_place_that_takes_no_lock_is_one_clear_error(tmp_path, monkeypatch, number, says):
    monkeypatch.setattr(FileLock, "acquire", lambda self: fail(number))
    with pytest.raises(ConfigError, match=says), lock_folder(tmp_path / "a"):
        pass


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch):
    monkeypatch.setattr(FileLock, "acquire", lambda self: fail(errno.ENOTSUP))
    notes = []
    with lock_folder(tmp_path / "a", on_note=notes.append):
        pass
    assert notes == [
        f"{tmp_path / 'a'}: this file system has no locks; do not write this folder with two processes at a time"
    ]


def fail(number):
    raise OSError(number, os.strerror(number))
