"""Writes the demo's adapter data (dialect HOUSE) and, if asked, a pretraining corpus (dialect BASE).

python tools/demo/make_data.py [--out FOLDER] [--corpus FOLDER --corpus-lines N]

Every line is one JSON list of messages: system, user, assistant. Each folder gets a `manifest.json` with the
number of lines, bytes and SHA-256 of every file. No request and no combination of arguments occurs in two of
train, valid, test and corpus. Same options, same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from grammar import BASE, HOUSE, Example, examples, messages, used

DATA = Path(__file__).resolve().parents[2] / "mlx_afm" / "assets" / "demo" / "data"
SPLITS = {"train": 800, "valid": 60, "test": 100}
SEED = 7


def house_splits(seed: int = SEED) -> dict[str, list[Example]]:
    """Train, valid and test examples of HOUSE, disjoint by request and by arguments."""
    splits: dict[str, list[Example]] = {}
    taken: frozenset[str | tuple[str, ...]] = frozenset()
    for offset, (name, count) in enumerate(reversed(SPLITS.items())):  # the held-out ones first: they stay as they
        splits[name] = examples(HOUSE, count, seed + offset, exclude=taken)  # are when the training set grows
        taken |= used(splits[name])
    return {name: splits[name] for name in SPLITS}


def corpus(lines: int, seed: int = SEED) -> dict[str, list[Example]]:
    """Train and valid (1,000 lines) examples of BASE that share nothing with the adapter data."""
    taken = frozenset().union(*(used(split) for split in house_splits(seed).values()))
    valid = examples(BASE, 1000, seed + 10, exclude=taken)
    return {"train": examples(BASE, lines, seed + 11, exclude=taken | used(valid)), "valid": valid}


def write_splits(folder: Path, splits: dict[str, list[Example]], dialect: str, seed: int) -> None:
    """Writes one JSONL file per split, and the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, split in splits.items():
        lines = [json.dumps(messages(example.request, example.command)) for example in split]
        content = "".join(f"{line}\n" for line in lines).encode()
        (folder / f"{name}.jsonl").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files[f"{name}.jsonl"] = {"lines": len(split), "bytes": len(content), "sha256": digest}
    manifest = {"dialect": dialect, "seed": seed, "files": files}
    (folder / "manifest.json").write_bytes(f"{json.dumps(manifest, indent=2)}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the adapter data")
    parser.add_argument("--corpus", type=Path, help="folder of the pretraining corpus (not written without this)")
    parser.add_argument("--corpus-lines", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    write_splits(options.out, house_splits(options.seed), HOUSE, options.seed)
    if options.corpus:
        write_splits(options.corpus, corpus(options.corpus_lines, options.seed), BASE, options.seed)


if __name__ == "__main__":
    main()
