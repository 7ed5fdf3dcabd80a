"""Running a command and watching it: wall-clock and peak anonymous memory; what machine this is; its best BLAS."""

from __future__ import annotations

import ctypes.util
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    seconds: float
    peak_anonymous_bytes: int
    output: str


def run(line: list[object]) -> Measured:
    """Runs a command; its RssAnon is read 50 times a second (Linux). File pages do not count: they can be dropped."""
    started, peak = time.perf_counter(), 0
    with subprocess.Popen([str(word) for word in line], stdout=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(status))
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, line))} ended with {process.returncode}")
    return Measured(seconds, peak, output)


def anonymous_bytes(status: Path) -> int:
    try:
        lines = status.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def read_once(path: Path) -> None:
    """Reads a file, so that it is where it was for everybody."""
    with path.open("rb", buffering=0) as handle:
        while handle.read(1 << 26):
            pass


def machine() -> str:
    import mlx.core as mx

    device = "CPU backend" if mx.default_device() == mx.cpu else mx.device_info()["device_name"]
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}"


def commit(root: Path = Path(__file__).parent) -> str:
    """The commit of a checkout, short; with "+" if files were changed since."""
    line = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    return subprocess.run(line, capture_output=True, text=True, cwd=root, check=True).stdout.strip()


def described(*packages: str) -> dict[str, object]:
    versions = {name: version(name) for name in packages}
    return {"machine": machine(), "versions": versions, "date": date.today().isoformat()}


def with_openblas() -> str:
    """The name of the preloaded OpenBLAS and its products; starts this program again with it if need be."""
    held, cpu = os.environ.get("LD_PRELOAD", ""), Path("/proc/cpuinfo")
    if not os.environ.get("OPENBLAS_CORETYPE") and cpu.exists() and "avx2" in cpu.read_text():
        os.environ["OPENBLAS_CORETYPE"] = "Haswell"
    if "openblas" not in held and sys.platform == "linux":
        found = ctypes.util.find_library("openblas")
        if found is None:
            print("OpenBLAS was not found: all run on the wheel's own BLAS", file=sys.stderr)
            return "none"
        os.environ["LD_PRELOAD"] = f"{found} {held}".strip()
        print(f"started again with LD_PRELOAD={found}", file=sys.stderr)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    return f"{held or 'none'}, core type {os.environ.get('OPENBLAS_CORETYPE', 'detected')}"
