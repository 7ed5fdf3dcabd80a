"""Our training step beside mlx-lm's: same weights, same data, interleaved, one run, float32.

    python benchmarks/bench_train.py --data tldr_train.jsonl [--cases a,c] [--repeat 3] [--json FILE]

    a   one step, 12 + 6 layers, width 1024, vocabulary 16,384, no packing: time
    b   the same: peak memory
    c   one step, 4 + 2 layers, width 512, vocabulary 153,600: time and peak memory
    d   an epoch over 500 lines of the data, 8 + 4 layers, width 512, vocabulary 16,384: time
    e   150 of these lines behind a system prompt of 300 tokens: time
    f   mlx-lm's default settings: the last 16 of 35 + 21 layers, rank 8, 4 examples a step; width 512, vocabulary
        16,384; 5 epochs over 500 lines: time of all of them, and time and peak memory of a later epoch. Ours keeps what
        the frozen layers give. mlx-lm's epochs are all alike: it runs one, which counts five times

In a, b and c a step is 4 rows of 256 tokens, of which the last quarter is trained. In d and e each side has its own
best batching: the fastest it has within the peak memory that mlx-lm takes at its default batch size. Rank 16 on all
linear layers, Adam; random weights; the demo tokenizer. Each side is alone in a process that loads, warms up, and
then runs when it is its turn. Times are medians (a, c) or sums over an epoch in turns (d, e); memory is MLX's peak,
weights included, and the peak of anonymous memory is told beside it. A ratio is ours / mlx-lm. The ratio of CPU
seconds is what to look at when the machine was not idle.

The BLAS in MLX's CPU wheel is slow, so OpenBLAS is preloaded for both if it is found. Versions that do not know the
processor fall back to SSE3 products, a third as fast, so it is told to take those for AVX2 where there is AVX2, unless
OPENBLAS_CORETYPE says otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from measured import anonymous_bytes, commit, described, with_openblas
from train_inputs import ROWS, fixed_rows, system_prompt, tokenized, turn_end_id, write_rows, write_weights

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "train.json"
SIZES = {
    "a": {"hidden_dim": 1024, "num_layers": 18, "num_kv_reuse_layers": 6, "vocab_size": 16384},
    "c": {"hidden_dim": 512, "num_layers": 6, "num_kv_reuse_layers": 2, "vocab_size": 153600},
    "f": {"hidden_dim": 512, "num_layers": 56, "num_kv_reuse_layers": 21, "vocab_size": 16384},
    "d": {"hidden_dim": 512, "num_layers": 12, "num_kv_reuse_layers": 4, "vocab_size": 16384},
}
LINES = {"d": 500, "e": 150}
FROZEN = {"num_layers": 16, "rank": 8, "scale": 20.0, "epochs": 5, "batching": {"batch_size": 4}}
THEIR_EPOCHS = 1
BATCH_SIZES = (1, 2, 4)  # tried for mlx-lm; the last is its default
BATCH_TOKENS = (512, 1024, 1536, 2048, 3072, 4096)  # tried for ours
TRIED_EXAMPLES = 32  # to choose a batching
TURNS = 3  # of an epoch
SIDES = ("ours", "mlx-lm")


class Side:
    """One contender in a process of its own."""

    def __init__(self, name: str, spec: dict) -> None:
        line = [sys.executable, str(HERE / "train_sides.py"), json.dumps({"side": name, **spec})]
        self.name, self.anonymous_peak = name, 0
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._watch, daemon=True).start()
        facts = self._answer()
        self.steps, self.warm_up = facts["steps"], facts["warm_up"]

    def _watch(self) -> None:
        status = Path(f"/proc/{self.process.pid}/status")
        while self.process.poll() is None:
            self.anonymous_peak = max(self.anonymous_peak, anonymous_bytes(status))
            time.sleep(0.2)

    def _answer(self) -> dict:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}")
        answer: dict = json.loads(line)
        return answer

    def run(self, steps: list[int]) -> dict[str, list[float]]:
        """Runs some steps; seconds, CPU seconds and loss of each."""
        self._order({"do": "run", "steps": steps})
        return self._answer()

    def peak(self) -> int:
        self._order({"do": "peak"})
        return self._answer()["mlx_peak_bytes"]

    def _order(self, order: dict) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Outcome:
    """What was measured of one side."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    mlx_peak_bytes: int = 0
    anonymous_peak_bytes: int = 0


def steps_in_turn(specs: dict[str, dict], repeat: int) -> dict[str, Outcome]:
    """`repeat` timed steps of each side after a warm-up, turn by turn."""
    sides = {name: Side(name, specs[name]) for name in SIDES}
    outcomes = {name: Outcome() for name in SIDES}
    for side in sides.values():
        side.run(side.warm_up)
    for _ in range(repeat):
        for name, side in sides.items():
            done = side.run([0])
            outcomes[name].seconds += done["seconds"]
            outcomes[name].cpu_seconds += done["cpu_seconds"]
            outcomes[name].losses += done["losses"]
    return finished(sides, outcomes)


def epoch_in_turns(specs: dict[str, dict]) -> dict[str, Outcome]:
    """An epoch of each side, cut into pieces that take turns."""
    sides = {name: Side(name, specs[name]) for name in SIDES}
    outcomes = {name: Outcome() for name in SIDES}
    for side in sides.values():
        side.run(side.warm_up)
    for turn in range(TURNS):
        for name, side in sides.items():
            steps = range(side.steps * turn // TURNS, side.steps * (turn + 1) // TURNS)
            done = side.run(list(steps))
            outcomes[name].seconds.append(sum(done["seconds"]))
            outcomes[name].cpu_seconds.append(sum(done["cpu_seconds"]))
            outcomes[name].losses.append(statistics.mean(done["losses"]))
    return finished(sides, outcomes)


def finished(sides: dict[str, Side], outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    for name, side in sides.items():
        outcomes[name].mlx_peak_bytes = side.peak()
        side.end()
        outcomes[name].anonymous_peak_bytes = side.anonymous_peak
    return outcomes


def tried(name: str, spec: dict, examples: int) -> tuple[float, int]:
    """Seconds per example and peak memory of a batching."""
    side = Side(name, spec)
    side.run(side.warm_up)
    chosen = list(range(min(side.steps, max(2, TRIED_EXAMPLES * side.steps // examples))))
    seconds = sum(side.run(chosen)["seconds"]) / len(chosen) * side.steps / examples
    peak = side.peak()
    side.end()
    return seconds, peak


def best_batching(spec: dict, examples: int) -> tuple[dict[str, dict], list[str]]:
    """The fastest of each side within the memory that mlx-lm takes at its default batch size."""
    notes, found = [], {}
    for size in BATCH_SIZES:
        found[size] = tried("mlx-lm", {**spec, "batching": {"batch_size": size}}, examples)
        notes.append(f"mlx-lm, {size} examples: {found[size][0] * 1e3:.0f} ms each, {found[size][1] / 1e6:.0f} MB")
    theirs = min(found, key=lambda size: found[size][0])
    limit, mine = found[BATCH_SIZES[-1]][1], {}
    for tokens in BATCH_TOKENS:
        seconds, peak = tried("ours", {**spec, "batching": {"batch_tokens": tokens}}, examples)
        notes.append(f"ours, {tokens} tokens: {seconds * 1e3:.0f} ms each, {peak / 1e6:.0f} MB")
        if peak > limit:
            break
        mine[tokens] = seconds
    ours = min(mine, key=lambda tokens: mine[tokens])
    notes.append(f"chosen within {limit / 1e6:.0f} MB, what mlx-lm takes at its default: the fastest of each side")
    notes.append(f"that is mlx-lm {theirs} examples, ours {ours} tokens")
    batchings = {"mlx-lm": {"batch_size": theirs}, "ours": {"batch_tokens": ours}}
    return {name: {**spec, "batching": batchings[name]} for name in SIDES}, notes


def measure(name: str, data: Path, folder: Path, repeat: int) -> tuple[dict[str, Outcome], list[str]]:
    """Outcome of both sides in a case, and how batches were chosen."""
    spec = write_weights(SIZES["d" if name in LINES else name], folder)
    if name not in LINES:
        spec |= {"rows": fixed_rows(data, folder / "fixed.npz"), "batching": {"rows": ROWS}}
        return steps_in_turn(dict.fromkeys(SIDES, spec), repeat), []
    rows = tokenized(data, LINES[name], system_prompt(data) if name == "e" else None)
    specs, notes = best_batching({**spec, "rows": write_rows(rows, folder / f"{name}.npz")}, len(rows))
    return epoch_in_turns(specs), notes


def frozen_case(data: Path, folder: Path) -> dict[str, object]:
    """Five epochs of ours over a store, in turns with two of mlx-lm's."""
    rows = tokenized(data, LINES["d"])
    spec = write_weights(SIZES["f"], folder) | FROZEN | {"rows": write_rows(rows, folder / "f.npz")}
    store = folder / "store"
    sides = {
        "ours": Side("ours", {**spec, "store": str(store), "prefix_end_id": turn_end_id()}),
        "mlx-lm": Side("mlx-lm", {**spec, "epochs": THEIR_EPOCHS}),
    }
    sides["mlx-lm"].run(sides["mlx-lm"].warm_up)
    epochs: dict[str, list[float]] = {name: [] for name in SIDES}
    losses: dict[str, list[float]] = {name: [] for name in SIDES}
    peaks: dict[str, list[int]] = {name: [] for name in SIDES}
    for epoch in range(FROZEN["epochs"]):
        for name in SIDES if epoch < THEIR_EPOCHS else ("ours",):
            count = sides[name].steps // (FROZEN["epochs"] if name == "ours" else THEIR_EPOCHS)
            done = sides[name].run(list(range(epoch * count, (epoch + 1) * count)))
            epochs[name].append(sum(done["seconds"]))
            losses[name].append(statistics.mean(done["losses"]))
            peaks[name].append(sides[name].peak())
    for side in sides.values():
        side.end()
    later, theirs = statistics.median(epochs["ours"][1:]), statistics.mean(epochs["mlx-lm"])
    lengths = [len(row) for row, _ in rows]
    trained = sum(len(row) - first for row, first in rows)
    return {
        "time_ratio": sum(epochs["ours"]) / (theirs * FROZEN["epochs"]),
        "later_epoch_time_ratio": later / theirs,
        "later_epoch_memory_ratio": max(peaks["ours"][1:]) / max(peaks["mlx-lm"]),
        "trained_share": trained / sum(lengths),
        "tokens": sum(lengths),
        "store_bytes": sum(path.stat().st_size for path in store.rglob("*") if path.is_file()),
        **{
            name: {
                "epochs": [round(each, 2) for each in epochs[name]],
                "losses": [round(each, 4) for each in losses[name]],
                "mlx_peak_bytes": peaks[name],
            }
            for name in SIDES
        },
    }


def as_case(outcomes: dict[str, Outcome], total: bool) -> dict[str, object]:
    summed = sum if total else statistics.median
    seconds = {name: summed(item.seconds) for name, item in outcomes.items()}
    cpu_seconds = {name: summed(item.cpu_seconds) for name, item in outcomes.items()}
    ours, theirs = (outcomes[name] for name in SIDES)
    return {
        "time_ratio": seconds["ours"] / seconds["mlx-lm"],
        "cpu_time_ratio": cpu_seconds["ours"] / cpu_seconds["mlx-lm"],
        "memory_ratio": ours.mlx_peak_bytes / theirs.mlx_peak_bytes,
        "anonymous_memory_ratio": ours.anonymous_peak_bytes / theirs.anonymous_peak_bytes,
        **{
            name: {
                "seconds": seconds[name],
                "cpu_seconds": cpu_seconds[name],
                "each": [round(each, 3) for each in item.seconds],
                "losses": [round(each, 4) for each in item.losses],
                "mlx_peak_bytes": item.mlx_peak_bytes,
                "anonymous_peak_bytes": item.anonymous_peak_bytes,
            }
            for name, item in outcomes.items()
        },
    }


def printed(name: str, case: dict) -> str:
    ours, theirs = case["ours"], case["mlx-lm"]
    return (
        f"| {name} | {ours['seconds']:.2f} | {theirs['seconds']:.2f}"
        f" | {case['time_ratio']:.2f} | {case['cpu_time_ratio']:.2f}"
        f" | {ours['mlx_peak_bytes'] / 1e6:.0f} | {theirs['mlx_peak_bytes'] / 1e6:.0f} | {case['memory_ratio']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON lines of messages")
    parser.add_argument("--cases", default="a,b,c,d,e,f")
    parser.add_argument("--repeat", type=int, default=3, help="timed steps in a, b and c")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    blas = with_openblas()
    wanted = ["a" if name == "b" else name for name in args.cases.split(",")]
    cases: dict[str, dict] = json.loads(args.json.read_text())["cases"] if args.json.exists() else {}
    facts = {**described("mlx", "mlx-lm", "numpy"), "blas": blas}
    args.json.parent.mkdir(exist_ok=True)
    print("| case | ours s | mlx-lm s | ratio | CPU time ratio | ours MB | mlx-lm MB | ratio |\n|" + "---|" * 8)
    with tempfile.TemporaryDirectory() as folder:
        for name in dict.fromkeys(wanted):
            if name == "f":
                cases[name] = {**frozen_case(args.data, Path(folder)), "commit": commit()}
                print(
                    f"| f | {json.dumps({k: v for k, v in cases[name].items() if k.endswith('ratio')})} |", flush=True
                )
                args.json.write_text(json.dumps({"cases": cases, **facts}, indent=2) + "\n")
                continue
            outcomes, notes = measure(name, args.data, Path(folder), args.repeat)
            cases[name] = {**as_case(outcomes, name in LINES), "commit": commit()}
            if notes:
                cases[name]["batching"] = notes
            if name == "a":
                cases["b"] = cases["a"]
            print("\n".join([printed(name, cases[name]), *(f"|  {note}" for note in notes)]), flush=True)
            args.json.write_text(json.dumps({"cases": cases, **facts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
