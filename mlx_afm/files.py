"""Writing files and folders so that nothing half-written can ever be mistaken for whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mlx_afm.errors import DiskFullError, FormatError

WRITE_OUT_BYTES = 1 << 27
PARTIAL = ".part"  # end of the names of temporary files and folders: `.NAME.xxxxxxxx.part`
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
REPLACE_ATTEMPTS = 100  # only other processes that write the same folder make more than one necessary


@contextmanager
def atomic_file(path: Path, wanted_bytes: int | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed to `path`.

    On any exception the temporary file is removed and `path` is as it was. A link is replaced, not followed.

    Args:
        path: the file.
        wanted_bytes: its size, if it is known; an error states it.

    Raises:
        DiskFullError: the file does not fit on its disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path, _make_file, wanted_bytes) as partial:
        yield partial
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp makes files private; ours are ordinary ones
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)


@contextmanager
def atomic_folder(path: Path, wanted_bytes: int | None = None) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it replaces `path`.

    On any exception the temporary folder is removed and `path` is as it was. Of two processes that finish at the
    same time the later one's folder stays. If `path` is a link, the folder that it names is replaced.

    Args:
        path: the folder.
        wanted_bytes: size of its files, if it is known; an error states it.

    Raises:
        DiskFullError: the folder does not fit on its disk.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with _partial(target, _make_folder, wanted_bytes) as partial:
        yield partial
        os.chmod(partial, 0o777 & ~_umask())
        _replace_folder(partial, target)


@contextmanager
def _partial(path: Path, make: Callable[[Path], Path], wanted_bytes: int | None) -> Iterator[Path]:
    """A temporary file or folder beside `path`, locked while it is written and removed at the end."""
    partial, descriptor = _make_locked(path, make)
    try:
        yield partial
    except OSError as error:
        if isinstance(error, DiskFullError) and wanted_bytes is None:  # of a file in this folder
            raise DiskFullError(
                error.what, where=path, expected=error.expected, found=error.found, advice=error.advice
            ) from error
        if isinstance(error, DiskFullError) or error.errno in DISK_FULL:
            raise disk_full(path, wanted_bytes, size_of(partial)) from error
        raise
    finally:
        remove(partial)
        os.close(descriptor)


def _make_locked(path: Path, make: Callable[[Path], Path]) -> tuple[Path, int]:
    """A new temporary file or folder and a descriptor that holds its lock.

    The lock ends with the process, however the process ends: `folders.remove_stale` takes an unlocked one for dead.
    """
    while True:
        partial = make(path)
        with suppress(FileNotFoundError):  # another process took it for dead before it was locked
            descriptor = os.open(partial, os.O_RDONLY)
            if lock_descriptor(descriptor) is not False and partial.exists():
                return partial, descriptor
            os.close(descriptor)


def lock_descriptor(descriptor: int) -> bool | None:
    """Whether the lock of an open file or folder was free and is now held; None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _make_file(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
    os.close(handle)
    return Path(name)


def _make_folder(path: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))


def remove(path: Path) -> None:
    """Removes a file or a folder with all its content; one that is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _replace_folder(new: Path, path: Path) -> None:
    """Renames a folder to `path`. One that is there is moved aside whole: no reader meets half of it."""
    aside = Path(f"{new}.old")
    for _ in range(REPLACE_ATTEMPTS):
        if path.is_dir() and not path.is_symlink():
            with suppress(FileNotFoundError):  # another process was faster
                os.replace(path, aside)
        try:
            os.replace(new, path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                if aside.exists():
                    os.replace(aside, path)
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    else:
        raise FileExistsError(errno.EEXIST, "other processes keep writing this folder", str(path))


def map_file(handle: BinaryIO) -> mmap.mmap:
    """A read-only memory map of an open file that is not empty, read ahead as files are mostly read: in order."""
    data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_SEQUENTIAL"):
        data.madvise(mmap.MADV_SEQUENTIAL)
    return data


class WriteOut:
    """Asks the system every 128 MB to start writing to disk what a file has got, without waiting for it.

    Without that it gathers gigabytes first, and the final sync waits for all of them.
    """

    def __init__(self, handle: BinaryIO) -> None:
        self.handle, self.waiting_bytes = handle, 0

    def add(self, count: int) -> None:
        """Told how many bytes were just written."""
        self.waiting_bytes += count
        if self.waiting_bytes >= WRITE_OUT_BYTES and hasattr(os, "posix_fadvise"):
            self.handle.flush()
            os.posix_fadvise(self.handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self.waiting_bytes = 0


def require_space(target: Path, wanted_bytes: int) -> None:
    """Checks that a folder about to be written fits on its disk.

    Raises:
        DiskFullError: it does not.
    """
    if free_bytes(target) < wanted_bytes:
        raise disk_full(target, wanted_bytes)


def free_bytes(target: Path) -> int:
    """Free bytes of the disk that a file or folder is on, or will be on."""
    place = target.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def disk_full(target: Path, wanted_bytes: int | None, written_bytes: int = 0) -> DiskFullError:
    """The error of a disk without room.

    Args:
        target: what is written.
        wanted_bytes: its size; None if it is not known.
        written_bytes: size of its unfinished part, which is about to be removed.
    """
    needed = written_bytes if wanted_bytes is None else wanted_bytes
    return DiskFullError(
        "not enough disk space",
        where=target,
        expected=f"{'more than ' if wanted_bytes is None else ''}{to_text(needed)} free",
        found=to_text(free_bytes(target) + written_bytes, like=needed),
        advice="Free some space, or choose a target on another disk.",
    )


def to_text(count: int, like: int | None = None) -> str:
    """A number of bytes in GB, or in MB if it is small; `like` is another number that chooses the unit."""
    unit, size = ("GB", 1e9) if (count if like is None else like) >= 5e7 else ("MB", 1e6)
    return f"{count / size:.2f} {unit}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically, with line feeds as they are."""
    with atomic_file(path) as partial:
        partial.write_bytes(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically: two spaces, non-ASCII as it is, one final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a UTF-8 JSON file.

    Raises:
        FormatError: no such file, not UTF-8, not JSON; with the place of the fault.
    """
    if not path.is_file():
        raise FormatError("no such file", where=path)
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise FormatError("not UTF-8 text", where=f"{path}, byte {error.start}") from error
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise FormatError(f"not JSON: {error}", where=path) from error


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
