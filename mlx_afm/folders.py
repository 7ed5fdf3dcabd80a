"""Folders that a command writes: one process at a time, and no remains of processes that were killed.

    PARENT/.NAME.lock            held while a process writes PARENT/NAME; removed at the end
    PARENT/.NAME.xxxxxxxx.part   what `atomic_file` and `atomic_folder` write; locked while its process lives

A lock ends with its process, so a killed process blocks nobody. Its `.part` is then unlocked: the next command that
writes in the same folder removes it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mlx_afm.errors import ConfigError
from mlx_afm.files import DISK_FULL, PARTIAL, disk_full, format_bytes, lock_descriptor, remove, size_of

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # some network disks
INNER_LOCK = ".mlx-afm.lock"
OnNote = Callable[[str], None]
# What `tempfile` makes of the names; `.old` is a folder that was moved aside to be replaced.
STALE = re.compile(rf"\.(?P<name>.+)\.[a-z0-9_]{{8}}{re.escape(PARTIAL)}(?P<old>\.old)?")


def ignore_note(text: str) -> None:
    """Takes a note and does nothing."""


@contextmanager
def lock_folder(folder: Path, *inner: str, what: str = "folder", on_note: OnNote = ignore_note) -> Iterator[None]:
    """Keeps other processes from writing a folder, and removes what killed processes left in it and beside it.

    Args:
        folder: the folder; it need not exist. Two names of one folder (links) have one lock.
        what: "file" if it is one; for messages.
        inner: names of folders in it whose remains are removed too.
        on_note: is given one sentence for each thing removed.

    Raises:
        ConfigError: another process writes the folder, or its place cannot be written.
    """
    place = Path(os.path.realpath(folder))
    with ExitStack() as stack:
        stack.enter_context(_parents_of(place))
        stack.enter_context(_locked(place, folder, what, on_note))
        for parent in (place.parent, place, *(place / name for name in inner)):
            remove_stale(parent, on_note)
        yield


@contextmanager
def new_folder(folder: Path, option: str, on_note: OnNote = ignore_note) -> Iterator[None]:
    """Locks the place of a folder that `atomic_folder` will write, and checks that it can appear there.

    Args:
        folder: must not exist yet, or be empty; a link stands for what it names.
        option: the option that gives it, for messages.
        on_note: see `lock_folder`.

    Raises:
        ConfigError: something is in the way, or the place cannot be written; before anything is computed.
    """
    with lock_folder(folder, on_note=on_note):
        require_new_folder(folder, option)
        yield


def require_new_folder(folder: Path, option: str) -> None:
    """Raises ConfigError if something is at this name, or a finished folder cannot be renamed to it."""
    require_replaceable(folder, option)
    if os.path.lexists(os.path.realpath(folder)) and not is_empty(folder):
        raise ConfigError("the target exists already", where=folder, advice=f"Remove it or choose another {option}.")


def require_replaceable(folder: Path, option: str) -> None:
    """Raises ConfigError if a finished folder cannot be renamed to this name, whatever is there."""
    place = Path(os.path.realpath(folder))
    advice = f"Choose another {option}: a new folder in it, such as {folder / 'new'}."
    if place.is_dir() and os.path.samefile(place, Path.cwd()):
        raise ConfigError("the current directory cannot be replaced", where=folder, advice=advice)
    if os.path.ismount(place):
        raise ConfigError("a mount point cannot be replaced", where=folder, advice=advice)
    if place.parent.is_dir() and not os.access(place.parent, os.W_OK | os.X_OK):
        raise ConfigError("cannot write in this folder", where=place.parent, advice=f"Choose another {option}.")


def is_empty(folder: Path) -> bool:
    """Whether a path is a folder without content; our own lock does not count."""
    return folder.is_dir() and all(entry.name == INNER_LOCK for entry in folder.iterdir())


def remove_stale(folder: Path, on_note: OnNote = ignore_note) -> None:
    """Removes the temporary files and folders of processes that were killed while they wrote in a folder.

    A folder that was moved aside to be replaced comes back if nothing took its place.

    Args:
        folder: is searched itself, not the folders in it.
        on_note: is given one sentence for each thing removed.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        found = STALE.fullmatch(path.name)
        if found and _is_ours(path):
            with _held(path) as dead:
                if dead:
                    on_note(_clear(path, folder / found["name"], bool(found["old"])))


def _clear(path: Path, target: Path, old: bool) -> str:
    if old and not target.exists():
        os.replace(path, target)
        return f"put back {target}, which a killed process had moved to {path.name}"
    size = format_bytes(size_of(path))
    remove(path)
    return f"removed {path} ({size}), the unfinished output of a killed process"


def _is_ours(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return not path.is_symlink() and path.stat().st_uid == os.getuid()
    return False


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Whether no living process holds a temporary file or folder; it is held meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield lock_descriptor(descriptor) is True
    finally:
        os.close(descriptor)


@contextmanager
def _parents_of(place: Path) -> Iterator[None]:
    """Makes the folders above a place; those that stay empty are removed at the end."""
    missing = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for parent in missing:  # the innermost first
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def _locked(place: Path, folder: Path, what: str, on_note: OnNote) -> Iterator[None]:
    file = _lock_file(place)
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        advice = f"Wait for it to end, or choose another {what}."
        raise ConfigError(f"another process is writing this {what}", where=folder, advice=advice) from None
    except OSError as error:
        if error.errno in DISK_FULL:
            raise disk_full(folder, None) from error
        if error.errno not in NO_LOCKS:
            reason, advice = error.strerror or str(error), f"Choose another {what}."
            raise ConfigError(f"cannot write here: {reason}", where=place.parent, advice=advice) from error
        on_note(f"{folder}: this file system has no locks; do not write this {what} with two processes at a time")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: nobody else has it
        lock.release()


def _lock_file(place: Path) -> Path:
    """Beside the folder; in it where only the folder itself can be written, such as a mounted disk."""
    beside = os.access(place.parent, os.W_OK | os.X_OK) or not place.is_dir()
    return place.parent / f".{place.name}.lock" if beside and place.name else place / INNER_LOCK
