"""Peak memory and time of `mlx-afm data check` on a JSONL file of 1 GB, or on any file (Linux).

    python benchmarks/data_check_memory.py --json benchmarks/results/data_check.json

The file is made first, in a temporary folder: short conversations, a tenth of them again later, as
many lines as possible, since it is lines that are remembered. Memory is the sum over the process and
its workers of what is resident, files' pages included, read 20 times a second.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measured import described

from mlx_afm.workflows.demo import ASSETS

WORDS = ["list", "show", "sort", "copy", "move", "find", "count", "print", "open", "close", "merge", "split"]
LIMIT_BYTES = 300_000_000


def write_lines(path: Path, wanted_bytes: int) -> None:
    rng, lines, size = random.Random(0), 0, 0
    earlier: list[str] = []
    with path.open("w", encoding="utf-8") as handle:
        while size < wanted_bytes:
            if earlier and rng.random() < 0.1:
                line = rng.choice(earlier)
            else:
                request = " ".join(rng.choices(WORDS, k=12)) + f" file{lines}.txt"
                turns = [{"role": "user", "content": request}, {"role": "assistant", "content": f"{request} done"}]
                line = json.dumps(turns) + "\n"
                if len(earlier) < 10_000:
                    earlier.append(line)
            handle.write(line)
            size, lines = size + len(line), lines + 1


def resident_bytes(root: int) -> int:
    """Of a process and all that descend from it."""
    parents, sizes = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            facts = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines() if ":" in line)
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry.name)] = int(facts["PPid"])
        sizes[int(entry.name)] = int(facts.get("VmRSS", "0 kB").split()[0]) * 1024
    family, found = {root}, True
    while found:
        found = {child for child, parent in parents.items() if parent in family} - family
        family |= found
    return sum(sizes.get(process, 0) for process in family)


def check(path: Path, model: list[str]) -> tuple[float, int, dict[str, Any]]:
    """Seconds, peak of resident bytes, and the report."""
    command, peak = [sys.executable, "-m", "mlx_afm", "data", "check", str(path), "--json", *model], 0
    with tempfile.TemporaryFile("w+b") as out:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        if process.returncode not in (0, 3):
            raise SystemExit(f"the check ended with {process.returncode}")
        out.seek(0)
        return seconds, peak, json.load(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--file", type=Path, help="check this one instead")
    parser.add_argument("--name", default="one_gigabyte", help="of the case")
    parser.add_argument("--no-tokenizer", action="store_true", help="check without lengths")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = [] if options.no_tokenizer else ["--model", str(ASSETS)]
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder) / "train.jsonl"
        if options.file is None:
            write_lines(path, int(options.gigabytes * 1e9))
        seconds, peak, report = check(path, model)
        size = path.stat().st_size
    case = {
        "file_bytes": size,
        "records": report["records"],
        "seconds": round(seconds, 1),
        "records_per_second": round(report["records"] / seconds),
        "peak_resident_bytes": peak,
        "peak_limit_bytes": LIMIT_BYTES,
        "counts": report["counts"],
        "tokens": report["tokens"],
    }
    print(json.dumps({options.name: case}, indent=2))
    if options.json:
        before = json.loads(options.json.read_text()) if options.json.is_file() else {"cases": {}}
        result = {"cases": {**before["cases"], options.name: case}, **described("numpy", "sentencepiece")}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if peak > LIMIT_BYTES:
        raise SystemExit(f"peak {peak:,} bytes, limit {LIMIT_BYTES:,}")


if __name__ == "__main__":
    main()
