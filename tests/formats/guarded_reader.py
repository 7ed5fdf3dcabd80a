"""Reads checkpoint files under guard, in a process of its own: python guarded_reader.py FOLDER

Around every read, address space is limited to what the process has plus 64 MB plus the file's size (where the system
can limit it), and an audit hook notes all that the interpreter reports of running code, starting processes, loading
libraries or opening anything but the file. Prints JSON: file name -> outcome, message, what was noted, seconds.
"""

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from mlx_afm.errors import FormatError
from mlx_afm.formats.torch_file import read_torch_checkpoint

ALLOWED_BYTES = 64 << 20
TOUCHED_BYTES = 1 << 20  # larger tensors (expanded ones) are looked at in their corners only
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_QUIET = ("open", "mmap.__new__", "object.__getattr__", "gc.", "sys._getframe", "os.listdir", "os.scandir", "time.")
_noted, _watching = [], []


def _hook(event, arguments):
    if not _watching:
        return
    if event == "open":
        path, _, flags = arguments
        if str(path) != _watching[0] or (flags or 0) & _WRITES:
            _noted.append(f"open {path}")
    elif not event.startswith(_QUIET):
        _noted.append(event)


@contextmanager
def guarded(path):
    """Watches, and limits address space; gives the list of what is noted."""
    _noted.clear()
    with limited(ALLOWED_BYTES + path.stat().st_size):
        _watching.append(str(path))
        try:
            yield _noted
        finally:
            _watching.clear()


@contextmanager
def limited(count):
    """Allocations beyond `count` bytes from here on are MemoryErrors."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def touched(tensor):
    """(dtype, shape, values as bytes), having checked them against each other."""
    array = tensor.read_stored()
    assert array.shape == tensor.shape
    assert array.nbytes == tensor.nbytes
    if array.nbytes <= TOUCHED_BYTES:
        return tensor.dtype, tensor.shape, array.tobytes()
    corners = [array[tuple(end * (size > 0) for size in array.shape)].tobytes() for end in (0, -1)]
    return tensor.dtype, tensor.shape, b"".join(corners)


def read(path):
    """The outcome: ("read", values by name), ("refused", message) or ("broke", the exception)."""
    try:
        tensors = read_torch_checkpoint(path).tensors
        return "read", {name: touched(tensor) for name, tensor in tensors.items()}
    except FormatError as error:
        return "refused", str(error)
    except BaseException as error:
        return "broke", f"{type(error).__name__}: {error}"


def guarded_read(path):
    """Outcome, values or message, what was noted, seconds."""
    started = time.perf_counter()
    with guarded(path) as noted:
        outcome, told = read(path)
    return outcome, told, list(noted), time.perf_counter() - started


def start_guard(example):
    """Installs the hook; a first read loads whatever Python loads late."""
    for _ in range(2):
        read(example)
    sys.addaudithook(_hook)


def main():
    folder, example = Path(sys.argv[1]), Path(sys.argv[2])
    start_guard(example)
    outcomes = {}
    for path in sorted(folder.iterdir()):
        outcome, told, noted, seconds = guarded_read(path)
        message = told if outcome != "read" else f"{len(told)} tensors"
        outcomes[path.name] = {"outcome": outcome, "message": message, "noted": noted, "seconds": seconds}
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
