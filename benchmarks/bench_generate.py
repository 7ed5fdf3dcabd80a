"""Our generation beside mlx-lm's: same weights, same prompts, interleaved, one run, float32.

    python benchmarks/bench_generate.py [--cases prefill_1024,decode_1024] [--repeat 5] [--json FILE]

    prefill_512, prefill_1024   seconds to the first token of an answer to 512 tokens, width 512 and 1024
    decode_512, decode_1024     seconds a token after that, 64 tokens behind a prompt of 64
    cached_prompt               seconds to the first token, a system prompt of 1,000 tokens being known; mlx-lm
                                computes it
    cached_both                 the same, and mlx-lm has it too, as its server does
    adapter_switch              seconds until another adapter of rank 16 on all projections is in place, both being
                                in memory; mlx-lm loads the model again
    adapter_from_file           the same, ours read from its file
    speculative                 seconds a token with a draft model of less than a tenth of the size, of whose 5
                                tokens at a time about 70 % are accepted; against mlx-lm's plain decoding, and
                                (speedup) our own
    mixed_adapters              seconds of 8 rows over 4 adapters of ranks 4 to 64 in one batch, width 1024, prompts of
                                16 tokens and answers of 64; against a batch for each adapter in turn, ours both

12 + 6 layers, vocabulary 16,384 (8,192 in the last), random weights. Each side is alone in a process that loads,
warms up with one run, and then runs when it is its turn. Times are medians; memory is MLX's peak, weights included.
A ratio is ours / mlx-lm. `same_tokens` is how many greedy tokens both sides had in common before random weights, which
prefer nothing, parted them. The ratio of CPU seconds is what to look at when the machine was not idle.

The BLAS in MLX's CPU wheel is slow, so OpenBLAS is preloaded for both if it is found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from generate_inputs import adapters_spec, model_spec, pair_spec, parameters_of
from measured import described, with_openblas

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "generate.json"
SIDES = ("ours", "mlx-lm")
CASES = (
    "prefill_512",
    "prefill_1024",
    "decode_512",
    "decode_1024",
    "cached_prompt",
    "cached_both",
    "adapter_switch",
    "adapter_from_file",
    "speculative",
    "mixed_adapters",
)
MIXED_RANKS = (4, 16, 32, 64)


class Side:
    """One contender in a process of its own."""

    def __init__(self, spec: dict) -> None:
        line = [sys.executable, str(HERE / "generate_sides.py"), json.dumps(spec)]
        self.name = spec["side"]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.runs: list[dict] = []

    def answer(self) -> dict:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}")
        answer: dict = json.loads(line)
        return answer

    def ask(self, what: str) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def outcome(self) -> dict:
        """Medians of the runs but the first, and what both sides are compared by."""
        peak = self.ask("peak")["mlx_peak_bytes"]
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        timed = self.runs[1:]
        facts = {
            name: sum(run[name] for run in timed) for name in ("drafted", "accepted", "rounds") if name in timed[0]
        }
        return {
            "seconds": statistics.median(run["seconds"] for run in timed),
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run in timed),
            "each": [round(run["seconds"], 5) for run in timed],
            "mlx_peak_bytes": peak,
            "tokens": timed[-1]["tokens"],
            **facts,
        }


def in_turns(specs: dict[str, dict], repeat: int) -> dict[str, dict]:
    """Outcomes of all contenders, which run one after the other, `repeat` times after a warm-up."""
    sides = {name: Side(spec) for name, spec in specs.items()}
    for side in sides.values():
        side.answer()
    for _ in range(repeat + 1):
        for side in sides.values():
            side.runs.append(side.ask("run"))
    return {name: side.outcome() for name, side in sides.items()}


def specs_of(case: str, folder: Path) -> dict[str, dict]:
    """What each contender of a case is to do."""
    name, _, width = case.partition("_")
    if name in ("prefill", "decode"):
        spec = {
            **model_spec(int(width), folder),
            "prompt_tokens": 512 if name == "prefill" else 64,
            "answer_tokens": 64,
        }
        return {side: {"side": side, "run": name, **spec} for side in SIDES}
    spec = model_spec(1024, folder)
    if name == "adapter":
        spec |= {**adapters_spec(spec, folder), "from_file": case == "adapter_from_file"}
        return {side: {"side": side, "run": "adapter", **spec} for side in SIDES}
    spec["prompt_tokens"] = 1000
    theirs = "cached" if case == "cached_both" else "uncached"
    return {
        "ours": {"side": "ours", "run": "cached", **spec},
        "mlx-lm": {"side": "mlx-lm", "run": theirs, **spec},
    }


def equal_beginning(one: list[int], other: list[int]) -> int:
    return next((place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), len(one))


def as_case(found: dict[str, dict]) -> dict[str, object]:
    ours, theirs = found["ours"], found["mlx-lm"]
    same = f"{equal_beginning(ours['tokens'], theirs['tokens'])} of {len(ours['tokens'])}"
    for side in found.values():
        del side["tokens"]
    return {
        "time_ratio": ours["seconds"] / theirs["seconds"],
        "cpu_time_ratio": ours["cpu_seconds"] / theirs["cpu_seconds"],
        "memory_ratio": ours["mlx_peak_bytes"] / theirs["mlx_peak_bytes"],
        "same_tokens": same,
        **found,
    }


def speculative(folder: Path, repeat: int) -> dict[str, object]:
    """With a draft against without, ours and mlx-lm's; sampled, so the tokens differ."""
    spec, expected = pair_spec(folder)
    spec |= {"prompt_tokens": 64, "answer_tokens": 64}
    specs = {
        "ours": {"side": "ours", "run": "speculative", **spec},
        "ours_plain": {"side": "ours", "run": "decode", **spec},
        "mlx-lm": {"side": "mlx-lm", "run": "decode", **spec},
    }
    found = in_turns(specs, repeat)
    ours = found["ours"]
    case = as_case(found)
    del case["same_tokens"]
    return {
        **case,
        "speedup": found["ours_plain"]["seconds"] / ours["seconds"],
        "acceptance_of_one_expected": expected,
        "acceptance": ours["accepted"] / ours["drafted"],
        "tokens_per_round": 1 + ours["accepted"] / ours["rounds"],
        "size_ratio": parameters_of(spec["config"]) / parameters_of(spec["draft"][0]),
    }


def mixed_adapters(folder: Path, repeat: int) -> dict[str, object]:
    """One batch of rows with different adapters against taking turns."""
    spec = model_spec(1024, folder)
    spec |= {**adapters_spec(spec, folder, MIXED_RANKS), "prompt_tokens": 16, "answer_tokens": 64}
    specs = {
        "ours": {"side": "ours", "run": "mixed", **spec, "turns": False},
        "mlx-lm": {"side": "ours", "run": "mixed", **spec, "turns": True},
    }
    case = as_case(in_turns(specs, repeat))
    case["turns"] = case.pop("mlx-lm")
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--repeat", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    if unknown := set(args.cases.split(",")) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    blas = with_openblas()
    cases: dict[str, dict] = {}
    print("| case | ours ms | mlx-lm ms | ratio | CPU time ratio | memory ratio | same tokens |\n|" + "---|" * 7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in args.cases.split(","):
            if case in ("speculative", "mixed_adapters"):
                found = {"speculative": speculative, "mixed_adapters": mixed_adapters}[case](folder, args.repeat)
            else:
                found = as_case(in_turns(specs_of(case, folder), args.repeat))
            cases[case] = found
            sides = [side for side in found.values() if isinstance(side, dict)]
            milliseconds = [f"{side['seconds'] * 1e3:.1f}" for side in sides[:2]]
            ratios = [f"{found[name]:.3f}" for name in ("time_ratio", "cpu_time_ratio", "memory_ratio")]
            print("| " + " | ".join([case, *milliseconds, *ratios, found.get("same_tokens", "-")]) + " |", flush=True)
            for fact in ("speedup", "acceptance", "tokens_per_round", "size_ratio"):
                if fact in found:
                    print(f"|   {fact} {found[fact]:.2f}", flush=True)
    args.json.parent.mkdir(exist_ok=True)
    facts = described("mlx", "mlx-lm", "numpy")
    args.json.write_text(json.dumps({"cases": cases, **facts, "blas": blas}, indent=2) + "\n")


if __name__ == "__main__":
    main()
