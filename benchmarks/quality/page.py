"""Puts the measured tables into docs/quality.md, between its marks.

python benchmarks/quality/page.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIRST, LAST = "<!-- measured: benchmarks/quality/page.py -->\n", "<!-- end -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    options = parser.parse_args()
    page, found = ROOT / "docs" / "quality.md", json.loads(options.json.read_text())
    before, _, rest = page.read_text(encoding="utf-8").partition(FIRST)
    after = rest.partition(LAST)[2]
    page.write_text(before + FIRST + "\n".join(lines(found)) + "\n" + LAST + after, encoding="utf-8")


def lines(found: dict[str, Any]) -> Iterator[str]:
    seeds, settings = found["seeds"], found["settings"]
    minutes = sum(sum(seed["seconds"].values()) for seed in seeds) / 60
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    count = f"{len(seeds)} seed{'s' * (len(seeds) != 1)}"
    yield (
        f"{count}{', mean and standard deviation' * (len(seeds) > 1)}. {settings['pretrain_steps']} steps of "
        f"pretraining, {settings['task_steps']} of each task adapter, {settings['recovery_steps']} of each recovery. "
        f"{found['machine']}, {packages}, {found['date']}, {minutes:.0f} minutes."
    )
    yield from ("", "### 1. A task learnt on codes", "", "| | exact match, % |", "|---|---|")
    for name, value in found["exact_match_percent"].items():
        yield f"| {name} | {told(value, 1, seeds)} |"
    yield ""
    per_seed = [seed["exact_match_percent"] for seed in seeds]
    gaps = [row["QLoRA 4-bit"] - row["LoRA"] for row in per_seed]
    each = ", ".join(f"{gap:+.1f}" for gap in gaps)
    yield f"QLoRA 4-bit less LoRA, by seed: {each}; mean {sum(gaps) / len(gaps):+.1f} points."
    yield from ("", "### 2. Loss lost and won back", "", "| | loss, nats a token | won back, % |", "|---|---|---|")
    for name, value in found["loss"].items():
        share = found["recovered_percent"][name]
        won = "" if name in ("dense", "2-bit") else told(share, 0, seeds)
        yield f"| {name} | {told(value, 4, seeds)} | {won} |"


def told(value: dict[str, float], digits: int, seeds: list[Any]) -> str:
    spread = f" ± {value['spread']:.{digits}f}" if len(seeds) > 1 else ""
    return f"{value['mean']:.{digits}f}{spread}"


if __name__ == "__main__":
    main()
