"""Kills a small training run with SIGKILL at random moments, resumes it until it ends, and compares.

    python tests/kill_driver.py MODEL DATA OUT [frozen]      one sitting: trains, or goes on with what is in OUT

With `frozen` the last layer alone is trained, and what the others give is kept beside OUT, for all runs.

A sitting is a process of its own, as a user's is. It says when it begins and before each step, and is killed
at a random moment after a random step: while it computes, evaluates, or writes any of its files.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlx.utils import tree_flatten

from mlx_afm import LoRAConfig, LoRAJob, TrainConfig, train
from mlx_afm.checkpoints.arrays import from_mlx
from mlx_afm.checkpoints.mlx_checkpoint import write_config
from mlx_afm.errors import AFMError
from mlx_afm.formats.mlx_folder import write_shards
from mlx_afm.formats.safetensors_file import read_safetensors
from mlx_afm.runs.folder import METRICS
from mlx_afm.runs.state import STATE, read_state
from mlx_afm.workflows.demo import ASSETS
from tiny import tiny_model

CONFIG = TrainConfig(
    iters=12, batch_size=2, learning_rate=3e-3, steps_per_eval=3, save_every=1, steps_per_report=2, seed=1
)
FORM = LoRAConfig(rank=4, dropout=0.1)
READY = "training"
COMPARED = ("adapters.safetensors", "adapter_config.json", "best/adapters.safetensors", "best/adapter_config.json")
MAX_KILLS_PER_RUN = 6
STEPS_BETWEEN_KILLS = 4  # at most


@dataclass
class Tally:
    """What happened: kills, runs that ended like the uninterrupted one, and files that could not be read."""

    kills: int = 0
    runs: int = 0
    identical: int = 0
    different: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    seconds: float = 0.0


def write_tiny_folders(folder: Path) -> tuple[Path, Path]:
    """A model folder with random weights and the demo's tokenizer, and a few lines of the demo's data."""
    model, data = folder / "model", folder / "data"
    for path in (model, data):
        path.mkdir(parents=True)
    tiny = tiny_model(vocab_size=512)
    write_shards(model, {name: from_mlx(array) for name, array in tree_flatten(tiny.parameters())})
    shutil.copyfile(ASSETS / "tokenizer.model", model / "tokenizer.model")
    write_config(model, tiny.args, {})
    for split, count in (("train", 20), ("valid", 4)):
        lines = (ASSETS / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return model, data


def start(model: Path, data: Path, out: Path, *how: str) -> subprocess.Popen[str]:
    """A sitting that has begun to train."""
    command = [sys.executable, str(Path(__file__)), *map(str, (model, data, out, *how))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == READY
    return process


def finish(process: subprocess.Popen[str]) -> int:
    """Waits for the end of a sitting."""
    process.communicate()
    return process.returncode


def metrics_without_times(out: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    times = ("seconds", "seconds_left", "tokens_per_second", "peak_memory_bytes")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def unreadable_files(out: Path) -> list[str]:
    """The files of a run that are there and cannot be read; hidden partial files are not files of a run."""
    faults = []
    for path in sorted(out.rglob("*.safetensors")):
        try:
            read_state(path) if path.name == STATE else read_safetensors(path)
        except AFMError as error:
            faults.append(str(error))
    return faults


class Pace:
    """How long the stretches of a sitting took lately: until its first step, and each step."""

    def __init__(self) -> None:
        self.seconds = {"start": 1.0, "step": 0.1}

    def wait(self, process: subprocess.Popen[str], steps: int, rng: random.Random) -> None:
        """Waits for so many steps and then for a random part of the next stretch."""
        assert process.stdout is not None
        for number in range(steps):
            begun = time.perf_counter()
            if not process.stdout.readline():
                return
            self.seconds["step" if number else "start"] = time.perf_counter() - begun
        time.sleep(rng.uniform(0, 1.1 * self.seconds["step" if steps else "start"]))


def kill_and_resume(kills: int, folder: Path, *how: str, seed: int = 0, tell=lambda text: None) -> Tally:
    """Kills sittings of a run until there were so many kills, each run being resumed to its end."""
    model, data = write_tiny_folders(folder)
    rng, pace, tally, started = random.Random(seed), Pace(), Tally(), time.perf_counter()
    whole = folder / "whole"
    assert finish(start(model, data, whole, *how)) == 0
    while tally.kills < kills:
        out = folder / f"run{tally.runs}"
        for _ in range(min(rng.randint(1, MAX_KILLS_PER_RUN), kills - tally.kills)):
            process = start(model, data, out, *how)
            pace.wait(process, rng.randint(0, STEPS_BETWEEN_KILLS), rng)
            process.kill()
            tally.kills += finish(process) == -9  # a run that had ended already is none
            tally.unreadable += unreadable_files(out)
        assert finish(start(model, data, out, *how)) == 0
        tally.runs += 1
        different = [part for part in COMPARED if (out / part).read_bytes() != (whole / part).read_bytes()]
        different += [METRICS] * (metrics_without_times(out) != metrics_without_times(whole))
        tally.different += [f"run {tally.runs}: {part}" for part in different]
        tally.identical += not different
        tell(f"{tally.kills} kills, {tally.identical} of {tally.runs} runs identical")
        shutil.rmtree(out)
    tally.seconds = time.perf_counter() - started
    return tally


def sitting(model: Path, data: Path, out: Path, how: str = "") -> None:
    """Trains, or goes on with what is there; says so before each step."""
    cache, lora = (out.parent / "cache", replace(FORM, layers="last-1")) if how == "frozen" else (None, FORM)
    mode = "recompute" if out.name == "whole" else "auto"
    job = LoRAJob(
        model=model,
        data=data,
        adapter_path=out,
        train=CONFIG,
        lora=lora,
        resume=True,
        cache=cache,
        frozen_cache=mode if how else "off",
    )
    print(READY, flush=True)
    train(job, should_stop=lambda: print("step", flush=True) or False)


if __name__ == "__main__":
    sitting(*map(Path, sys.argv[1:4]), *sys.argv[4:])
