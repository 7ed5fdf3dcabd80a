"""Mutated checkpoint files, thousands of them: python tests/formats/fuzz_torch.py --count 20000 --seed 0

Each is read under the guard of `guarded_reader`: 64 MB of address space beyond the file's size, nothing executed,
nothing else opened. It must be refused with one FormatError, or be read: with all values of the original, or as a
checkpoint that is sound in itself and says something else. Prints the counts; exit code 1 and the numbers of the
mutants if there was anything else. `--only NUMBER` reads one mutant again and says what came of it.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import guarded_reader
from torch_mutations import mutant

FIXTURES = Path(__file__).parent / "fixtures"
MAX_SECONDS = 10


def outcome_of(path, original):
    """(outcome, message, seconds) of one file; anything but the first three outcomes is a fault."""
    outcome, told, noted, seconds = guarded_reader.guarded_read(path)
    if noted:
        return "did something else", str(noted), seconds
    if seconds > MAX_SECONDS:
        return "took too long", "", seconds
    if outcome == "read":
        return ("read, equal" if told == original else "read, other"), "", seconds
    return outcome, told, seconds


def fuzz(count, seed, only=None):
    """What came of so many mutants."""
    fixtures = {path.name: path.read_bytes() for path in sorted(FIXTURES.glob("*.pt"))}
    originals = {name: guarded_reader.read(FIXTURES / name)[1] for name in fixtures}
    guarded_reader.start_guard(FIXTURES / "tied.pt")
    counts, mutations, faults, slowest = Counter(), {}, [], (0.0, 0)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant.pt"
        for index in range(count) if only is None else [only]:
            name, steps, data = mutant(fixtures, seed, index)
            path.write_bytes(data)
            outcome, message, seconds = outcome_of(path, originals[name])
            counts[outcome] += 1
            mutations.setdefault(steps[0], Counter())[outcome] += 1
            slowest = max(slowest, (seconds, index))
            untouched = path.read_bytes() == data and list(Path(folder).iterdir()) == [path]
            if outcome not in ("refused", "read, equal", "read, other") or not untouched:
                faults.append(f"mutant {index} ({name}, {'+'.join(steps)}): {outcome} {message[:500]}")
            if only is not None:
                print(f"{name}, {'+'.join(steps)}, {len(data)} bytes: {outcome} {message}")
    return {
        "count": sum(counts.values()),
        "seed": seed,
        "outcomes": dict(sorted(counts.items())),
        "mutations": {name: dict(sorted(some.items())) for name, some in sorted(mutations.items())},
        "slowest_seconds": round(slowest[0], 4),
        "slowest_mutant": slowest[1],
        "seconds": round(time.perf_counter() - started, 1),
        "faults": faults,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of a mutant")
    options = parser.parse_args()
    told = fuzz(options.count, options.seed, options.only)
    print(json.dumps(told, indent=2))
    sys.exit(1 if told["faults"] else 0)


if __name__ == "__main__":
    main()
