"""Writing files and folders so that nothing half-written can ever be mistaken for whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mlx_afm.errors import DiskFullError, FormatError, SettingError

WRITE_OUT_BYTES = 1 << 27
PARTIAL = ".part"  # end of the names of temporary files and folders: `.NAME.xxxxxxxx.part`
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
LFS_START = b"version https://git-lfs.github.com/spec/"  # of a Git LFS pointer: a text of some lines
MAPPED_FROM_BYTES = 1 << 20  # smaller files may be rewritten in place while they are open
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096  # of a fingerprint
LFS_MOST_BYTES = 1024
REPLACE_ATTEMPTS = 100  # only other processes that write the same folder make more than one necessary


def to_path(path: str | os.PathLike[str]) -> Path:
    """The path, with `~` or `~user` at its beginning replaced by the home folder, as a shell does.

    Every path that a user gives comes through here: options, keys of a YAML file and arguments in Python.

    Raises:
        SettingError: not a text, an empty text, or a text with a NUL character.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise SettingError("not a path", expected="a str or a Path", found=f"{path!r:.80}")
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise SettingError("not a path", expected="a text that is not empty, without NUL", found=f"{text!r:.80}")
    return Path(os.path.expanduser(text))


def to_optional_path(path: str | os.PathLike[str] | None) -> Path | None:
    """The same; None stays None."""
    return None if path is None else to_path(path)


def parse_bytes(text: str) -> int:
    """The number of bytes that `200MB`, `1.5 GB`, `16G` or `4096` mean; `16GiB` counts in powers of 1024.

    Raises:
        SettingError: something else.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE | re.ASCII)
    if match is None:
        raise SettingError("not a size", expected="a number of bytes such as 200MB or 1.5GB", found=f"{text!r:.80}")
    thousands = 0 if not match[2] else 1 + "KMGT".index(match[2].upper())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** thousands)


def set_paths(settings: object, *names: str) -> None:
    """Passes attributes of a frozen dataclass through `to_path`; None stays None, and a tuple is a tuple of paths.

    Raises:
        SettingError: see `to_path`; with the name of the attribute.
    """
    for name in names:
        value = getattr(settings, name)
        try:
            paths = tuple(map(to_path, value)) if isinstance(value, (tuple, list)) else to_optional_path(value)
        except SettingError as error:
            raise SettingError(error.what, where=name, expected=error.expected, found=error.found) from None
        object.__setattr__(settings, name, paths)


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


def require_not_lfs_pointer(path: Path, text: bytes | None = None) -> None:
    """Checks that a file that exists is not a Git LFS pointer, which a clone without Git LFS has in its place.

    Args:
        path: the file.
        text: its content if it was read already.

    Raises:
        FormatError: it is one; with the size that the file itself has.
    """
    size = path.stat().st_size if text is None else len(text)
    if size > LFS_MOST_BYTES:
        return
    text = path.read_bytes() if text is None else text
    if text.startswith(LFS_START):
        sizes = [line.removeprefix(b"size ") for line in text.splitlines() if line.startswith(b"size ")]
        expected = f"{int(sizes[0]):,} bytes" if sizes and sizes[0].isdigit() else "the file itself"
        advice = "Run `git lfs pull` in its folder, or download the file itself."
        what, found = "a Git LFS pointer, not the file that it stands for", f"{len(text)} bytes"
        raise FormatError(what, where=path, expected=expected, found=found, advice=advice)


def visible(paths: Iterable[Path]) -> list[Path]:
    """The paths in order, without hidden ones: macOS leaves `._NAME` beside each file on other file systems."""
    return sorted(path for path in paths if not path.name.startswith("."))


def map_file(handle: BinaryIO) -> mmap.mmap:
    """A read-only memory map of an open file that is not empty, read ahead as files are mostly read: in order."""
    data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_SEQUENTIAL"):
        data.madvise(mmap.MADV_SEQUENTIAL)
    return data


class OpenFiles:
    """Files that are opened once: the content of each is kept for whoever asks again.

    Small files are read; those above `MAPPED_FROM_BYTES` are memory-mapped.
    """

    def __init__(self) -> None:
        self._contents: dict[Path, bytes | mmap.mmap] = {}

    def read(self, path: Path) -> bytes | mmap.mmap:
        """The content of a file.

        Raises:
            FormatError: no such file, or a Git LFS pointer. OSError: it cannot be read.
        """
        if path not in self._contents:
            if not path.is_file():
                raise FormatError("no such file", where=path)
            if path.stat().st_size < MAPPED_FROM_BYTES:
                content = path.read_bytes()
                require_not_lfs_pointer(path, content)
                self._contents[path] = content
            else:
                with path.open("rb") as handle:
                    self._contents[path] = map_file(handle)
        return self._contents[path]

    def read_json(self, path: Path) -> Any:
        """The value in a UTF-8 JSON file.

        Raises:
            FormatError: see `read`; or not UTF-8, not JSON, with the place of the fault.
        """
        content = bytes(self.read(path))
        try:
            return json.loads(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise FormatError("not UTF-8 text", where=f"{path}, byte {error.start}") from error
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            raise FormatError(f"not JSON: {error}", where=path) from error


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
        expected=f"{'more than ' if wanted_bytes is None else ''}{format_bytes(needed)} free",
        found=format_bytes(free_bytes(target) + written_bytes, like=needed),
        advice="Free some space, or choose a target on another disk.",
    )


def format_bytes(count: float, like: int | None = None) -> str:
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


def to_json(
    value: Any, *, indent: int | None = None, ascii_only: bool = False, default: Callable[[Any], Any] | None = None
) -> str:
    """Strict JSON text of a value: everything that is printed, sent or written as JSON goes through here.

    JSON has no NaN and no infinity, so null takes the place of a number that is not finite.

    Args:
        value: dicts, lists, tuples, texts, numbers, booleans and None.
        indent: spaces a level; None for one line.
        ascii_only: escape what is not ASCII.
        default: makes such a value of any other object.
    """
    settings: dict[str, Any] = {"indent": indent, "ensure_ascii": ascii_only, "default": default, "allow_nan": False}
    try:
        return json.dumps(value, **settings)
    except ValueError:
        return json.dumps(_finite(value), **settings)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key) if isinstance(key, float) else key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON atomically: two spaces, non-ASCII as it is, one final newline."""
    write_text(path, to_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value in a UTF-8 JSON file.

    Raises:
        FormatError: no such file, a Git LFS pointer, not UTF-8, not JSON; with the place of the fault.
    """
    return OpenFiles().read_json(path)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint_of_files(paths: Iterable[Path], files: OpenFiles | None = None) -> str:
    """SHA-256 of names, sizes and samples of some files.

    Not of every byte, which would take ten seconds for the real model: both ends and 64 blocks of each.

    Args:
        paths: the files.
        files: has those that are open already.
    """
    digest, files = hashlib.sha256(), files or OpenFiles()
    for path in paths:
        content = files.read(path)
        size = len(content)
        digest.update(f"{path.name} {size}\n".encode())
        for number in range(SAMPLED_BLOCKS + 1):
            start = max(0, (size - BLOCK_BYTES) * number // SAMPLED_BLOCKS)
            digest.update(content[start : start + BLOCK_BYTES])
    return digest.hexdigest()
