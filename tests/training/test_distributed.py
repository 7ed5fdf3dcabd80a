"""Several processes train as one: the same losses and weights, one that writes, and none that waits for ever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from kill_driver import metrics_without_times, write_tiny_folders
from rank_driver import BASE, LIMIT_SECONDS, SAME, examples, free_ports, run_ranks, start_ranks, trained

import mlx_afm
from mlx_afm.errors import ConfigError, DistributedError
from mlx_afm.runs.activation_store import STORES, list_stores
from mlx_afm.runs.state import STATE, read_state
from mlx_afm.training import DataOrder, Ranks, distributed, join_ranks
from mlx_afm.training.distributed import ALONE, launched_size, shard
from mlx_afm.workflows.toolkit_train import train_adapter

CLOSE = 1e-5
LAUNCH = Path(sys.executable).parent / "mlx.launch"


def two(count: int = 2) -> list[Ranks]:
    return [Ranks(rank=rank, size=count) for rank in range(count)]


def test_examples_are_dealt_in_turn():
    batches = [(7, 3, 5), (1, 2, 9), (4,), (6,)]
    assert [shard(batches, ranks) for ranks in two()] == [[(7, 5), (2,), (4,)], [(3,), (1, 9), (6,)]]
    assert shard(batches, ALONE) == batches
    for count in (2, 3, 5, 11):
        parts = [sum(shard(batches, ranks), ()) for ranks in two(count)]
        assert sorted(sum(parts, ())) == [1, 2, 3, 4, 5, 6, 7, 9]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_rows_are_dealt_whole_and_the_rest_is_cut(count, rows):
    data = examples(40)
    order = DataOrder(data, replace(BASE, batch_tokens=30))
    batches = order.epoch(0)[:rows]
    parts = [order.share(batches, ranks) for ranks in two(count)]
    assert sorted(chain(*chain(*parts))) == sorted(chain(*batches))
    for rank, part in enumerate(parts):
        whole = rows // count
        assert part[:whole] == batches[rank : whole * count : count]
        rest = batches[whole * count :]
        assert len(part[whole:]) <= len(rest)
        assert all(any(set(piece) <= set(row) for row in rest) for piece in part[whole:])
    if count == 2 and rows == 1:
        tokens = [sum(len(data[index]) for index in part[0]) for part in parts]
        assert max(tokens) < 3 * min(tokens), "halves of about the same size"


def test_a_process_alone_does_not_ask_for_others(monkeypatch):
    monkeypatch.setattr(mx.distributed, "init", lambda **options: pytest.fail("asked"))
    assert join_ranks() is ALONE
    array = mx.array([1.0])
    assert ALONE.sum_arrays([array])[0] is array
    assert ALONE.sum_numbers(0.1, 2) == [0.1, 2]
    assert (ALONE.any(True), ALONE.any(False), ALONE.is_main_process) == (True, False, True)
    ALONE.wait()
    ALONE.require_same({"a": 1})


@pytest.mark.parametrize(
    ("variables", "hosts", "size"),
    [
        ({}, None, 1),
        ({"MLX_RANK": "0"}, "", 1),
        ({"MLX_RANK": "0"}, '[["127.0.0.1:1"], ["127.0.0.1:2"]]', 2),
        ({}, '[["127.0.0.1:1"], ["127.0.0.1:2"]]', 1),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, None, 3),
        ({"PMI_SIZE": "4"}, None, 4),
        ({"MLX_RANK": "1", "MLX_WORLD_SIZE": "2"}, None, 2),
        ({"MLX_RANK": "1"}, None, 0),
    ],
)
def test_what_launchers_say(monkeypatch, tmp_path, variables, hosts, size):
    for name in ("MLX_HOSTFILE", "MLX_RANK", *distributed.SIZES):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
        monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    assert launched_size() == size


def test_a_list_of_hosts_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    with pytest.raises(ConfigError, match="not a list of hosts"):
        launched_size()
    (tmp_path / "hosts").write_text("[")
    with pytest.raises(ConfigError, match="not a list of hosts"):
        launched_size()


def test_the_toolkits_training_is_for_one_process(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    settings = SimpleNamespace(require_data=lambda: None)
    with pytest.raises(ConfigError, match=r"train_adapter is for one process. .*mlx.launch -n N"):
        train_adapter(settings, lambda event: None, lambda: False)


def test_gradients_travel_in_blocks(monkeypatch):
    monkeypatch.setattr(distributed, "BLOCK_BYTES", 40)
    arrays = [mx.zeros((size,)) for size in (4, 6, 1, 20, 2, 3)]
    assert [[array.size for array in block] for block in distributed._blocks(arrays)] == [[4, 6], [1], [20], [2, 3]]


def test_a_lost_connection_is_our_error_and_leaves_no_timer():
    before = threading.active_count()
    lost = pytest.raises(DistributedError, match=r"a process of the run was lost: gone.*--resume")
    with lost, distributed._patience(9):
        raise RuntimeError("gone")
    time.sleep(0.05)
    assert threading.active_count() == before


def test_streams_differ_by_rank_step_and_seed():
    keys = set()
    for rank, seed, step in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]:
        Ranks(rank=rank, size=2).seed(seed, step)
        keys.add(tuple(mx.random.state[0].tolist()))
    assert len(keys) == 4


@pytest.fixture
def folder(tmp_path):
    write_tiny_folders(tmp_path)
    return tmp_path


def require_ends(ends, *codes):
    assert [code for code, _ in ends] == list(codes), "\n".join(text for _, text in ends)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_sums(tmp_path, count):
    require_ends(run_ranks("sums", tmp_path, count), *[0] * count)
    total, thirds = count * (count + 1) / 2, sum([1 / 3] * count)
    arrays = [[[total] * 3] * 2, [float(count * i) for i in range(5)], float(count)]
    for rank in range(count):
        told = json.loads((tmp_path / f"sums {rank}.json").read_text())
        assert told == {"arrays": arrays, "numbers": [1e300, thirds, count * (2**40 + 1)], "any": [True, False]}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_the_same_as_one_process(tmp_path, count):
    require_ends(run_ranks("same", tmp_path, count), *[0] * count)
    for name, config in SAME.items():
        _, losses, weights = trained(config)
        found = [np.load(tmp_path / f"{name} {rank}.npz") for rank in range(count)]
        assert found[0]["losses"].shape == np.array(losses).shape, name
        assert np.abs(found[0]["losses"] - losses).max() < CLOSE, name
        assert all(len(other["losses"]) == 0 for other in found[1:]), "only rank 0 tells"
        assert max(np.abs(array).max() for tensor, array in weights.items() if "lora_b" in tensor) > 20 * CLOSE
        for tensor, expected in weights.items():
            assert np.abs(found[0][tensor] - expected).max() < CLOSE, (name, tensor)
            assert all(np.array_equal(other[tensor], found[0][tensor]) for other in found[1:]), (name, tensor)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_rank_is_left_out_by_all(tmp_path):
    require_ends(run_ranks("not_finite", tmp_path), 0, 0)
    first, second = (np.load(tmp_path / f"weights {rank}.npz") for rank in (0, 1))
    assert all(np.array_equal(first[name], second[name]) for name in first.files)
    assert first["skipped"] == 1
    assert all(np.isfinite(first[name]).all() for name in first.files)


@pytest.mark.slow
def test_one_asked_to_stop_stops_all_and_resuming_is_exact(folder):
    require_ends(run_ranks("left_and_resumed", folder), 0, 0)
    ends = [json.loads((folder / f"ends {rank}.json").read_text()) for rank in (0, 1)]
    assert all((end["left"], end["again"]) == ([3, True], [9, False]) for end in ends)
    assert ends[0]["told"] > 0
    assert ends[1]["told"] == 0
    assert not (folder / "whole 1").exists(), "rank 0 alone writes"
    for part in ("adapters.safetensors", "best/adapters.safetensors"):
        assert (folder / "left" / part).read_bytes() == (folder / "whole 0" / part).read_bytes()
    assert metrics_without_times(folder / "left") == metrics_without_times(folder / "whole 0")
    assert not list(folder.rglob("*.part*"))


@pytest.mark.slow
def test_what_the_ranks_keep_of_frozen_layers_is_what_they_compute(folder):
    require_ends(run_ranks("frozen", folder), 0, 0)
    written = [(folder / name / "adapters.safetensors").read_bytes() for name in ("kept", "found", "recomputed")]
    assert written[0] == written[1] == written[2]
    (store,) = list_stores(folder / "cache" / STORES)
    assert len(list((folder / "cache" / STORES / store["name"]).glob("*.values"))) == 2, "one of each rank"


@pytest.mark.slow
def test_ranks_that_were_given_different_things_are_refused(folder):
    ends = run_ranks("disagreeing", folder)
    require_ends(ends, 1, 1)
    for _, text in ends:
        assert "ConfigError: the processes of the run do not agree (found different train)" in text
    assert not (folder / "never").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_nothing_is_lost(folder):
    require_ends(run_ranks("whole", folder), 0, 0)
    started = time.monotonic()
    ends = run_ranks("lost", folder)
    assert time.monotonic() - started < 60
    require_ends(ends, 1, -signal.SIGKILL)
    assert "DistributedError: a process of the run was lost" in ends[0][1]
    assert read_state(folder / "run" / STATE).step == 5, "the steps done, not those of the last save"
    require_ends(run_ranks("resumed", folder), 0, 0)
    for part in ("adapters.safetensors", "best/adapters.safetensors"):
        assert (folder / "run" / part).read_bytes() == (folder / "whole" / part).read_bytes()


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_in_bounded_time(folder):
    command = [sys.executable, str(Path(__file__).parents[1] / "rank_driver.py"), "stopped", str(folder)]
    with start_ranks(command, 2, folder) as (first, _):
        _, text = first.communicate(timeout=LIMIT_SECONDS)
    assert first.returncode == 1
    assert "mlx-afm: no word from the other processes for 4 seconds" in text
    assert read_state(folder / "run" / STATE).step == 4, "the last save"


@pytest.mark.slow
def test_one_that_nobody_meets(tmp_path):
    command = [sys.executable, str(Path(__file__).parents[1] / "rank_driver.py"), "patient", str(tmp_path)]
    with start_ranks(command, 2, tmp_path, only=(0,)) as (first,):
        _, text = first.communicate(timeout=LIMIT_SECONDS)
    assert first.returncode == 1
    assert "Timeout (0:00:02)!" in text
    assert "in join_ranks" in text


def options(folder: Path, name: str) -> list[str]:
    given = {"model": folder / "model", "data": folder / "data", "adapter-path": folder / name, "iters": 60, "rank": 4,
             "batch-size": 3, "steps-per-report": 1, "schedule": "constant", "warmup": 0}  # fmt: skip
    return ["lora", "--train", "--no-cache", *chain(*([f"--{name}", str(value)] for name, value in given.items()))]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(folder):
    command = [sys.executable, "-m", "mlx_afm", *options(folder, "run")]
    with start_ranks(command, 2, folder) as (first, second):
        for line in first.stderr:
            if line.startswith("step 2/"):
                break
        os.kill(second.pid, signal.SIGTERM)
        out, told = first.communicate(timeout=LIMIT_SECONDS)
        silent = second.communicate(timeout=LIMIT_SECONDS)
    assert (first.returncode, second.returncode) == (143, 0), told
    assert "stopped and saved after step" in told
    assert "to go on: mlx-afm lora" in told
    assert "adapter path" in out
    assert silent == ("", "")
    step = read_state(folder / "run" / STATE).step
    assert 2 <= step < 60
    with start_ranks([*command, "--resume", "--iters", str(step + 2)], 2, folder) as (first, second):
        _, told = first.communicate(timeout=LIMIT_SECONDS)
        second.communicate(timeout=LIMIT_SECONDS)
    assert (first.returncode, second.returncode) == (0, 0), told
    assert f"resuming after step {step} of {step + 2}" in told


LAUNCHERS = {
    "mlx.launch": (LAUNCH, "-n", "2", "--starting-port", "PORT", "--"),
    "mpirun": (Path(shutil.which("mpirun") or "mpirun"), "--allow-run-as-root", "--oversubscribe", "-np", "2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_through_a_launcher(folder, launcher):
    program, *words = LAUNCHERS[launcher]
    if not program.exists():
        pytest.skip(f"needs {launcher}")
    shutil.copy(folder / "data" / "valid.jsonl", folder / "data" / "test.jsonl")
    arguments = [*options(folder, "run"), "--iters", "6", "--test", "--json"]
    launch = [str(program), *(str(free_ports(1)[0]) if word == "PORT" else word for word in words)]
    ran = subprocess.run(
        [*launch, sys.executable, "-m", "mlx_afm", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_SECONDS, cwd=folder,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["steps"], told["test_examples"]) == (6, 4)
    assert ran.stderr.count("done after 6 steps") == 1
    alone = mlx_afm.train(
        mlx_afm.LoRAJob(
            model=folder / "model", data=folder / "data", adapter_path=folder / "alone", cache=None,
            lora=mlx_afm.LoRAConfig(rank=4),
            train=mlx_afm.TrainConfig(iters=6, batch_size=3, steps_per_report=1, schedule="constant", warmup=0),
        )
    )  # fmt: skip
    assert alone.best_loss == pytest.approx(told["best_valid_loss"], abs=CLOSE)
    ours, theirs = (mx.load(str(folder / name / "adapters.safetensors")) for name in ("run", "alone"))
    # AdamW divides a gradient by its size, so where that is mere rounding a value may move by a whole step elsewhere.
    differences = np.concatenate([np.abs(np.array(ours[name] - theirs[name])).ravel() for name in ours])
    assert np.mean(differences) < CLOSE / 10
    assert np.mean(differences > CLOSE) < 0.01
    assert differences.max() < 1e-3  # the learning rate
