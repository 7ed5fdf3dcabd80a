"""Long answers with a draft model whose number of proposals adapts, against plain decoding.

    python benchmarks/bench_draft_length.py --json benchmarks/results/draft_length.json

Cases, each an answer of --tokens tokens; both sides in turns in one process, with one BLAS:

    good_auto       sampled, with a draft that agrees with the target mostly; the number adapts
    bad_auto        greedy, with a draft of the same size that is never right
    costly_auto     the same with half the target's layers
    good_fixed      as good_auto, with 5 proposals in each round
    bad_fixed       as bad_auto, with 5 proposals in each round

`time_ratio` is with draft / without, the median over the repeats of pairs; `low` and `high` are its quartiles;
`cpu_ratio` is the same of the processor time of all threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from generate_inputs import WANTED_AGREEMENT, scale_outputs
from measured import described, with_openblas
from mlx.utils import tree_flatten

from mlx_afm.generation import Engine, GenerateConfig, Request
from mlx_afm.generation.forms import decoder_of
from mlx_afm.generation.speculation import Speculation
from mlx_afm.model import AFMConfig, Model

SIZES = {"hidden_dim": 256, "num_layers": 10, "num_kv_reuse_layers": 4, "num_heads": 4, "num_kv_heads": 2}
VOCABULARY = 2048
# The number of proposals, None adapts; and the temperature.
CASES = {
    "good_auto": (None, 1.0),
    "bad_auto": (None, 0.0),
    "costly_auto": (None, 0.0),
    "good_fixed": (5, 1.0),
    "bad_fixed": (5, 0.0),
}
PROMPT = list(range(1, 33))


def models() -> tuple[Model, dict[str, Model]]:
    """A target, and drafts: its first layer, which agrees with it since the others add little; and random ones."""
    mx.random.seed(0)
    target = Model(AFMConfig(vocab_size=VOCABULARY, **SIZES))
    held = dict(tree_flatten(target.parameters()))
    drafts = {}
    for name, layers in (("good", 1), ("bad", 1), ("costly", SIZES["num_layers"] // 2)):
        mx.random.seed(len(drafts) + 1)
        drafts[name] = Model(
            AFMConfig(
                vocab_size=VOCABULARY, **{**SIZES, "num_layers": layers, "num_kv_reuse_layers": 0, "kv_quant": False}
            )
        )
    drafts["good"].load_weights(
        [(name, held[name]) for name, _ in tree_flatten(drafts["good"].parameters())], strict=False
    )
    tokens = mx.array(np.random.default_rng(0).integers(1, VOCABULARY, (1, 256)))
    proposed, low, high = mx.softmax(drafts["good"](tokens)[0], axis=-1), 0.0, 2.0
    for _ in range(12):
        factor = (low + high) / 2
        scale_outputs(target, held, factor)
        share = mx.minimum(proposed, mx.softmax(target(tokens)[0], axis=-1)).sum(axis=-1).mean().item()
        low, high = (low, factor) if share < WANTED_AGREEMENT else (factor, high)
    for model in (target, *drafts.values()):
        model.eval()
        mx.eval(model.parameters())
    return target, drafts


def run(target: Model, speculation: Speculation | None, tokens: int, seed: int, temp: float) -> np.ndarray:
    """Seconds a token of one answer, after the first; of the clock, and of the processor."""
    engine = Engine(decoder_of(target).decoder, speculation=speculation)
    config = GenerateConfig(max_tokens=tokens, temp=temp, seed=seed)
    (row,) = engine.add(Request(ids=PROMPT, config=config))
    while not row.tokens:
        engine.step()
    started = np.array([time.perf_counter(), time.process_time()])
    while engine.busy:
        engine.step()
    return (np.array([time.perf_counter(), time.process_time()]) - started) / (len(row.tokens) - 1)


def case(
    target: Model,
    draft: Model,
    number: int | None,
    temp: float,
    *,
    tokens: int,
    repeat: int,
    clock: Callable[[], float],
) -> dict[str, float]:
    """Answers with and without the draft in turns; each with counts of its own, so that it learns anew."""
    for given in (None, Speculation(draft=draft, num_draft_tokens=number, clock=clock)):
        run(target, given, 40, seed=0, temp=temp)
    ratios, plain, rounds, accepted, drafted = [], [], [], 0, 0
    for seed in range(repeat):
        speculation = Speculation(draft=draft, num_draft_tokens=number, clock=clock)
        order = (speculation, None) if seed % 2 else (None, speculation)
        pair = [run(target, given, tokens, seed, temp) for given in order]
        ours, without = pair if seed % 2 else reversed(pair)
        ratios.append(ours / without)
        plain.append(without[0])
        rounds.append(speculation.rounds)
        accepted, drafted = accepted + speculation.accepted, drafted + speculation.drafted
    walls = [ratio[0] for ratio in ratios]
    quartiles = statistics.quantiles(walls, n=4) if repeat > 1 else walls * 3
    found = {
        "time_ratio": statistics.median(walls),
        "low": quartiles[0],
        "high": quartiles[2],
        "cpu_ratio": statistics.median(ratio[1] for ratio in ratios),
        "plain_seconds": statistics.median(plain),
        "rounds": statistics.median(rounds),
        "acceptance": accepted / drafted if drafted else 0.0,
    }
    return {name: float(value) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cpu-clock", action="store_true", help="Adapt by processor time: on a machine that is busy.")
    parser.add_argument("--case", action="append", choices=CASES)
    args = parser.parse_args()
    blas = with_openblas()
    target, drafts = models()
    clock = time.process_time if args.cpu_clock else time.perf_counter
    found = {}
    for name in args.case or CASES:
        found[name] = case(
            target, drafts[name.partition("_")[0]], *CASES[name], tokens=args.tokens, repeat=args.repeat, clock=clock
        )
        print(name, {key: round(value, 4) for key, value in found[name].items()}, file=sys.stderr, flush=True)
    result = {"cases": found, **described("mlx"), "blas": blas, "cpu_clock": args.cpu_clock, "tokens": args.tokens}
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
