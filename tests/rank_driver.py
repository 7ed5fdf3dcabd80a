"""Runs one scenario as one of several processes, without a launcher: `start_ranks` gives them what it would.

python tests/rank_driver.py SCENARIO FOLDER      as a process with MLX_RANK and MLX_HOSTFILE
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_afm import LoRAConfig, LoRAJob, TrainConfig
from mlx_afm import train as train_folder
from mlx_afm.adapters import add_adapter
from mlx_afm.data import Tokens
from mlx_afm.errors import AFMError
from mlx_afm.training import Hooks, join_ranks, train
from mlx_afm.training import step as step_module
from tiny import tiny_model

LIMIT_SECONDS = 90  # for every process that tests start
BASE = TrainConfig(
    epochs=2, batch_size=3, learning_rate=1e-3, steps_per_eval=4, steps_per_report=1, save_every=3, seed=5
)
# Settings under which several processes must do what one does.
SAME = {
    "odd batches": BASE,
    "accumulation": replace(BASE, batch_size=2, grad_accumulation_steps=3),
    "nothing for rank 1": replace(BASE, batch_size=1, iters=4),
    "ones in turn": replace(BASE, batch_size=1, grad_accumulation_steps=3, iters=4),
    "rows cut": replace(BASE, batch_tokens=24, iters=5),
    "rows and one cut": replace(BASE, batch_tokens=16, grad_accumulation_steps=3, iters=3),
    "sgd": replace(BASE, optimizer="sgd", learning_rate=0.05, weight_decay=None, clip_grad_norm=0, iters=5),
    "checkpointing": replace(BASE, grad_checkpoint=True, iters=4),
}
JOB_CONFIG = replace(BASE, epochs=1, iters=9, batch_size=3, schedule="constant", warmup=0, save_every=4)
DROPOUT = LoRAConfig(rank=4, dropout=0.2)


def examples(count: int, seed: int = 0) -> list[Tokens]:
    """Rows of unequal lengths; half of them begin alike."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        ids = rng.integers(1, 61, rng.integers(4, 12)).astype(np.int32)
        if index % 2:
            ids[:3] = 7, 8, 9
        weights = (rng.random(len(ids)) < 0.6).astype(np.float32)
        weights[-1] = 1
        rows.append(Tokens(ids, weights, f"line {index}"))
    return rows


def trained(config: TrainConfig, ranks=None, **form):
    """Losses told, and the trained tensors."""
    model, losses = tiny_model(), []
    add_adapter(model, LoRAConfig(rank=4, **form), seed=2)

    def tell(event):
        if hasattr(event, "loss"):
            losses.append([event.step, event.loss])

    extra = {} if ranks is None else {"ranks": ranks}
    state = train(model, examples(14), examples(5, seed=1), config, Hooks(on_event=tell), **extra)
    return state, losses, {name: np.array(array) for name, array in tree_flatten(model.trainable_parameters())}


def same(folder: Path) -> None:
    ranks = join_ranks(LIMIT_SECONDS)
    for name, config in SAME.items():
        _, losses, weights = trained(config, ranks)
        np.savez(folder / f"{name} {ranks.rank}.npz", losses=np.array(losses), **weights)


def sums(folder: Path) -> None:
    ranks = join_ranks(LIMIT_SECONDS)
    arrays = [mx.full((2, 3), ranks.rank + 1.0), mx.arange(5, dtype=mx.float32), mx.array(1.0)]
    summed = [array.tolist() for array in ranks.sum_arrays(arrays)]
    numbers = ranks.sum_numbers(1e300 * (ranks.rank == 0), 1 / 3, 2**40 + 1)
    wanted = ranks.any(ranks.rank == 1), ranks.any(False)
    told = {"arrays": summed, "numbers": numbers, "any": wanted}
    (folder / f"sums {ranks.rank}.json").write_text(json.dumps(told))


def not_finite(folder: Path) -> None:
    """Rank 1 meets a loss that is not a number in one of its micro-batches."""
    ranks, plain, calls = join_ranks(LIMIT_SECONDS), step_module.chunked_cross_entropy, []

    def loss(*arguments):
        calls.append(1)
        return plain(*arguments) * (float("nan") if ranks.rank == 1 and len(calls) == 2 else 1.0)

    step_module.chunked_cross_entropy = loss
    state, _, weights = trained(replace(BASE, iters=4), ranks)
    np.savez(folder / f"weights {ranks.rank}.npz", skipped=state.skipped, **weights)


def job(folder: Path, name: str, **changes) -> LoRAJob:
    values = {"model": folder / "model", "data": folder / "data", "adapter_path": folder / name, "train": JOB_CONFIG}
    return LoRAJob(**{**values, "lora": DROPOUT, "cache": folder / "cache", **changes})


def left_and_resumed(folder: Path) -> None:
    """Rank 1 is asked to stop after three steps; only rank 0's folder must be there in the end."""
    ranks, asked = join_ranks(LIMIT_SECONDS), []
    train_folder(job(folder, f"whole {ranks.rank}"))
    left = train_folder(job(folder, "left"), should_stop=lambda: bool(asked.append(1)) or len(asked) * ranks.rank > 3)
    told = []
    again = train_folder(job(folder, "left", resume=True), told.append)
    ends = {"left": [left.steps, left.interrupted], "again": [again.steps, again.interrupted], "told": len(told)}
    (folder / f"ends {ranks.rank}.json").write_text(json.dumps(ends))


def disagreeing(folder: Path) -> None:
    ranks = join_ranks(LIMIT_SECONDS)
    train_folder(job(folder, "never", train=replace(JOB_CONFIG, learning_rate=0.01 + 0.01 * ranks.rank)))


def whole(folder: Path) -> None:
    train_folder(job(folder, "whole"))


def resumed(folder: Path) -> None:
    train_folder(job(folder, "run", resume=True))


def lost(folder: Path, number: int = signal.SIGKILL, seconds: float = LIMIT_SECONDS) -> None:
    """Rank 1 is killed, or stopped, before its sixth step."""
    ranks, asked = join_ranks(seconds), []

    def die() -> bool:
        asked.append(1)
        if ranks.rank == 1 and len(asked) == 6:
            os.kill(os.getpid(), number)
        return False

    config = replace(JOB_CONFIG, rank_timeout_seconds=seconds)
    train_folder(job(folder, "run", train=config), should_stop=die)


def stopped(folder: Path) -> None:
    lost(folder, signal.SIGSTOP, 4.0)


def frozen(folder: Path) -> None:
    """A run over kept activations, one that finds them, and one that keeps none."""
    for name, mode in (("kept", "auto"), ("found", "auto"), ("recomputed", "recompute")):
        few = LoRAConfig(rank=4, layers="last-1")
        train_folder(job(folder, name, lora=few, frozen_cache=mode, train=replace(JOB_CONFIG, iters=None, epochs=3)))


def patient(folder: Path) -> None:
    """One that nobody meets."""
    join_ranks(2.0)


SCENARIOS = {
    run.__name__: run
    for run in (same, sums, not_finite, left_and_resumed, disagreeing, whole, resumed, lost, stopped, frozen, patient)
}


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def start_ranks(command: list[str], count: int, folder: Path, *, only: tuple[int, ...] | None = None):
    """Processes of a ring on this machine; none outlives the block."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
    processes = []
    try:
        for rank in only or range(count):
            environment = {**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
            processes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run_ranks(scenario: str, folder: Path, count: int = 2) -> list[tuple[int, str]]:
    """Exit code and stderr of each rank."""
    command = [sys.executable, __file__, scenario, str(folder)]
    with start_ranks(command, count, folder) as processes:
        ends = [(process.communicate(timeout=LIMIT_SECONDS)[1], process.returncode) for process in processes]
    return [(code, text) for text, code in ends]


if __name__ == "__main__":
    try:
        SCENARIOS[sys.argv[1]](Path(sys.argv[2]))
    except AFMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
