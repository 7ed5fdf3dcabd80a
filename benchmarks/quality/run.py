"""What quantization costs a small model and what wins it back, over several seeds; see docs/quality.md.

    python benchmarks/quality/run.py --data DIR [--seeds 3] [--json FILE] [--work DIR]

DIR holds tldr_train.jsonl, tldr_valid.jsonl and tldr_test.jsonl, a conversation a line whose user says `page: request`
and whose assistant answers with a command (made from the tldr-pages project, CC BY 4.0). For every seed a tiny AFM is
pretrained on them; then table 1 (exact match of a task) and table 2 (loss). Results are written after every seed.

The BLAS in MLX's CPU wheel is slow; preload OpenBLAS on Linux.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measured import described
from tables import Plan, loss_table, task_table
from task import write_data
from tiny_afm import SIZES, pretrain

from mlx_afm.training import Evaluated, StepsReported, TrainConfig

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quality.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain-steps", type=int, default=160)
    parser.add_argument("--task-steps", type=int, default=450)
    parser.add_argument("--recovery-steps", type=int, default=30)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help="Folder for models and adapters; default: one that is removed.")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="quality-"))
    try:
        run(options, work)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)


def run(options: argparse.Namespace, work: Path) -> None:
    records = write_data(options.data, work / "data")
    say(f"records: {records}")
    settings = {name: value for name, value in vars(options).items() if name.endswith("_steps")}
    done: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        done.append(one_seed(seed, options, work))
        result = {"settings": {**settings, "model": SIZES, "records": records}, "seeds": done, **summary(done)}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**result, **described("mlx", "mlx-afm")}, indent=1) + "\n")
    for table in ("exact_match_percent", "loss", "recovered_percent"):
        print(f"\n{table.replace('_', ' ')}")
        for name, value in summary(done)[table].items():
            print(f"  {name:50} {value['mean']:8.3f}  +- {value['spread']:.3f}")


def one_seed(seed: int, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    started, folder = time.perf_counter(), work / f"seed {seed}"
    config = TrainConfig(
        iters=options.pretrain_steps,
        batch_size=32,
        learning_rate=4e-3,
        weight_decay=0.05,
        optimizer_config={"betas": [0.9, 0.95]},
        steps_per_report=25,
        steps_per_eval=options.pretrain_steps + 1,
        seed=seed,
    )
    loss = pretrain(work / "data" / "pretrain", folder / "dense", config, tell)
    seconds = {"pretraining": round(time.perf_counter() - started)}
    say(f"seed {seed}: pretrained to {loss:.4f}")
    plan = Plan(seed=seed, task_steps=options.task_steps, recovery_steps=options.recovery_steps)
    losses = loss_table(folder / "dense", work / "data" / "pretrain", folder / "loss", plan, say)
    seconds["loss"] = round(time.perf_counter() - started) - sum(seconds.values())
    matches = task_table(folder / "dense", work / "data" / "task", folder / "task", plan, say)
    seconds["task"] = round(time.perf_counter() - started) - sum(seconds.values())
    return {"seed": seed, "seconds": seconds, "exact_match_percent": matches, "loss": losses}


def summary(seeds: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and spread (standard deviation of the seeds, 0 for one) of all cases, and of the share of the lost loss."""
    recovered = []
    for seed in seeds:
        loss = seed["loss"]
        lost = loss["2-bit"] - loss["dense"]
        recovered.append({name: 100 * (loss["2-bit"] - value) / lost for name, value in loss.items()})
    tables = {"recovered_percent": recovered}
    tables |= {name: [seed[name] for seed in seeds] for name in ("exact_match_percent", "loss")}
    return {table: {name: _over([row[name] for row in rows]) for name in rows[0]} for table, rows in tables.items()}


def _over(values: list[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.fmean(values), 4), "spread": round(spread, 4)}


def tell(event: object) -> None:
    if isinstance(event, (StepsReported, Evaluated)):
        say(f"  step {event.step} loss {event.loss:.4f}")


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
