"""Kills a small training run 200 times at random moments, resumes it each time, and writes what came of it.

    python benchmarks/kill_resume.py [--kills 200] [--frozen] [--json benchmarks/results/kill_resume.json]

The run trains a tiny model of the real architecture (LoRA of rank 4 with dropout, 12 steps, its state saved
after each); SIGKILL comes at a random moment of a random step, up to six times a run. What a run leaves in the
end (the last and the best adapter, the metrics without times) is compared byte for byte with an uninterrupted
run's. With `--frozen` the last layer alone is trained over kept activations, which killed runs left; it is compared
with a run that keeps none.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from kill_driver import CONFIG, kill_and_resume  # noqa: E402
from measured import described  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "kill_resume.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        how = ["frozen"] if arguments.frozen else []
        tally = kill_and_resume(arguments.kills, Path(folder), *how, seed=arguments.seed, tell=print)
    result = {**asdict(tally), "steps_per_run": CONFIG.iters, "seed": arguments.seed}
    arguments.json.write_text(json.dumps({**result, **described("mlx", "mlx-lm", "numpy")}, indent=2) + "\n")
    print(json.dumps(result))
    sys.exit(3 if tally.different or tally.unreadable or tally.identical != tally.runs else 0)


if __name__ == "__main__":
    main()
