"""Writing files and folders so that nothing half-written can ever be mistaken for whole."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mlx_afm.errors import ConfigError, FormatError

WRITE_OUT_BYTES = 1 << 27
REPLACE_ATTEMPTS = 100  # only other processes that write the same folder make more than one necessary


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed to `path`.

    On any exception the temporary file is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp makes files private; ours are ordinary ones
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it replaces `path`.

    On any exception the temporary folder is removed and `path` is as it was. Of two processes that finish at the
    same time the later one's folder stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield partial
        os.chmod(partial, 0o777 & ~_umask())
        _replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def visible(paths: Iterable[Path]) -> list[Path]:
    """The paths in order, without hidden ones: macOS leaves `._NAME` beside each file on other file systems."""
    return sorted(path for path in paths if not path.name.startswith("."))


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
        ConfigError: it does not.
    """
    place = target.absolute()
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < wanted_bytes:
        expected, found = f"{wanted_bytes / 1e9:.2f} GB free", f"{free_bytes / 1e9:.2f} GB"
        advice = "Free some space, or choose a target on another disk."
        raise ConfigError("not enough disk space", where=target, expected=expected, found=found, advice=advice)


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
