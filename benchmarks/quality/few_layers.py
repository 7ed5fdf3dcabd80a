"""What training few layers costs in quality, and what it gains in time.

    python benchmarks/quality/few_layers.py --data DIR [--seeds 3] [--json FILE]

For every seed an AFM of 9 + 5 layers (the real model's shares of 35 + 21), width 128, is pretrained on tldr. It then
learns the task of `task.py`, with adapters of rank 16 on all layers, on the reuse layers, and on the last 4 (as the
last 16 of 56), whose frozen layers are computed once: for equally many steps, and for as many steps as fit into the
time of all layers. Exact match of the test split in percent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measured import commit, described, with_openblas
from run import say, tell
from tables import TASK_RANK, Plan
from task import write_data
from tiny_afm import READING, SIZES, exact_match, pretrain

import mlx_afm
from mlx_afm import LoRAConfig, LoRAJob, TrainConfig

RESULTS = Path(__file__).resolve().parents[1] / "results" / "few_layers.json"
DEEP = {**SIZES, "num_layers": 14, "num_kv_reuse_layers": 5}
FORMS = {"all": "all", "reuse layers": "reuse", "last 4": "last-4"}


def trained(model: Path, data: Path, out: Path, layers: str, config: TrainConfig) -> dict[str, float]:
    """Trains, scores the last adapter, and tells the seconds and the steps."""
    job = LoRAJob(
        model=model,
        data=data,
        adapter_path=out,
        train=config,
        lora=LoRAConfig(rank=TASK_RANK, layers=layers),
        data_config=READING,
        cache=out.parent / "cache",
    )
    started = time.perf_counter()
    done = mlx_afm.train(job)
    seconds = time.perf_counter() - started
    score = exact_match(model, out, data / "test.jsonl")
    return {"exact_match_percent": score, "seconds": seconds, "steps": done.steps}


def one_seed(seed: int, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    folder = work / f"seed {seed}"
    config = TrainConfig(
        iters=options.pretrain_steps,
        batch_size=32,
        learning_rate=3e-3,
        weight_decay=0.05,
        optimizer_config={"betas": [0.9, 0.95]},
        steps_per_report=25,
        steps_per_eval=options.pretrain_steps + 1,
        seed=seed,
    )
    loss = pretrain(work / "data" / "pretrain", folder / "dense", config, tell, DEEP)
    say(f"seed {seed}: pretrained to {loss:.4f}")
    plan = Plan(seed=seed, task_steps=options.task_steps, recovery_steps=0).task()
    found: dict[str, Any] = {"seed": seed, "loss": loss}
    for name, layers in FORMS.items():
        run = trained(folder / "dense", work / "data" / "task", folder / name, layers, plan)
        found[name] = {"equal steps": run}
        if name != "all":
            longer = replace(plan, iters=round(plan.iters * found["all"]["equal steps"]["seconds"] / run["seconds"]))
            longer = replace(longer, steps_per_eval=longer.iters + 1, save_every=longer.iters + 1)
            out = folder / f"{name} longer"
            found[name]["equal time"] = trained(folder / "dense", work / "data" / "task", out, layers, longer)
        say(f"{name}: {json.dumps(found[name])}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain-steps", type=int, default=160)
    parser.add_argument("--task-steps", type=int, default=300)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    blas, seeds = with_openblas(), []
    with tempfile.TemporaryDirectory() as work:
        records = write_data(options.data, Path(work) / "data")
        for seed in range(options.seeds):
            seeds.append(one_seed(seed, options, Path(work)))
            rows = [
                (f"{form}, {kind}", [each[form][kind]["exact_match_percent"] for each in seeds])
                for form in FORMS
                for kind in seeds[0][form]
            ]
            means = {name: [statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0] for name, v in rows}
            facts = {"records": records, "model": DEEP, "commit": commit(), **described("mlx"), "blas": blas}
            result = {"mean_and_spread": means, "seeds": seeds, **facts}
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(means, indent=1))


if __name__ == "__main__":
    main()
