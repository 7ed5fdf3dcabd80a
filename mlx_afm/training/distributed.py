"""Several processes that train one model: who has which examples, and sums over all of them.

Each holds the whole model. Gradients, losses and token counts are summed over the processes and divided once,
so that N of them take the steps one would take with the same batches. Only rank 0 is told of progress and
saves. `mx.distributed` does the talking (ring, MPI, and what else MLX has); a process that was not started as
one of several never asks for it.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_afm.errors import ConfigError, DistributedError

BLOCK_BYTES = 1 << 26  # gradients are joined into arrays of about this size: few messages, little extra memory
TIMEOUT_SECONDS = 600.0
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MLX_WORLD_SIZE")  # of Open MPI, MPICH and mlx.launch's NCCL
LOST = "Files saved before are intact: start all of them again with --resume."


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and this one's place among them.

    Attributes:
        rank: from 0; rank 0 leads.
        size: how many there are.
        timeout_seconds: how long one waits for the others before it gives up.

    Every method that talks to the others must be called by all of them in the same order. A lost process is a
    `DistributedError` where the connection says so. Where it says nothing (a stopped process, a cable pulled),
    the process ends after `timeout_seconds` with one line on stderr and exit code 1, since nothing can call a
    thread back that waits inside MLX.
    """

    rank: int = 0
    size: int = 1
    timeout_seconds: float = TIMEOUT_SECONDS
    group: Any = None

    @property
    def is_main_process(self) -> bool:
        """Whether this process tells and saves."""
        return self.rank == 0

    def sum_numbers(self, *values: float) -> list[float]:
        """Sums over all ranks: float64, in order of rank, so the same everywhere to the last bit."""
        if self.size == 1:
            return list(values)
        return [float(total) for total in self._gather(np.array(values, np.float64)).sum(axis=0)]

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return self.sum_numbers(float(flag))[0] > 0

    def wait(self) -> None:
        """Returns when all ranks have come here."""
        self.any(False)

    def sum_arrays(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Sums of each array over all ranks; they must have one dtype.

        Cost: two blocks of 64 MB, or two copies of an array that is larger.
        """
        if self.size == 1:
            return list(arrays)
        sums: list[mx.array] = []
        for block in _blocks(arrays):
            joined = mx.concatenate([array.reshape(-1) for array in block])
            mx.eval(joined)
            with self._patience():
                total = mx.distributed.all_sum(joined, group=self.group)
                mx.eval(total)
            ends = np.cumsum([array.size for array in block])[:-1].tolist()
            parts = mx.split(total, ends)
            sums += [part.reshape(array.shape) for part, array in zip(parts, block)]
            mx.eval(sums[-len(block) :])
        return sums

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Checks that all ranks were given the same; JSON values by name.

        Raises:
            ConfigError: on all ranks; which facts differ.
        """
        if self.size == 1:
            return
        prints = [hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for value in facts.values()]
        found = self._gather(np.frombuffer(b"".join(prints), np.int32).astype(np.float64))
        differs = (found != found[0]).reshape(self.size, len(facts), -1).any(axis=(0, 2))
        if differs.any():
            advice = "Give every process the same options, data, model and, to resume, the same run folder."
            names = ", ".join(name for name, wrong in zip(facts, differs) if wrong)
            raise ConfigError("the processes of the run do not agree", found=f"different {names}", advice=advice)

    def seed(self, seed: int, step: int) -> None:
        """Sets the random stream of this rank for a step: a function of both and the rank, so nothing need be kept."""
        mx.random.seed(int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)[0]))

    def _gather(self, values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The values of all ranks (size, values); float64 travels as its bits, since GPUs have none."""
        bits = mx.array(values.view(np.int32))
        with self._patience():
            gathered = mx.distributed.all_gather(bits, group=self.group)
            mx.eval(gathered)
        return np.array(gathered).view(np.float64).reshape(self.size, -1)

    @contextmanager
    def _patience(self) -> Iterator[None]:
        with _patience(self.timeout_seconds):
            yield


ALONE = Ranks()


def launched_size() -> int:
    """How many processes this one was started as part of, as launchers say it; 1 if it was started alone.

    0 if it is one of several and the launcher does not say how many.
    """
    hosts = os.environ.get("MLX_HOSTFILE")
    if "MLX_RANK" in os.environ and hosts is not None:
        try:
            text = Path(hosts).read_text(encoding="utf-8").strip()
            return len(json.loads(text)) if text else 1  # `mlx.launch -n 1` writes an empty file
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError("MLX_HOSTFILE is not a list of hosts", where=hosts) from error
    for name in SIZES:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0 if "MLX_RANK" in os.environ else 1


def join_ranks(timeout_seconds: float = TIMEOUT_SECONDS) -> Ranks:
    """Meets the other processes of this run, if it was started as one of several; may be called again.

    Raises:
        DistributedError: they cannot be reached.
    Cost: nothing for a process alone. MLX's ring waits 30 seconds for a process to appear, so join early.
    """
    size = launched_size()
    if size == 1:
        return ALONE
    faulthandler.dump_traceback_later(timeout_seconds, exit=True, file=2)  # MLX holds the interpreter meanwhile
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise DistributedError(f"the other processes of the run were not met: {error}") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    if size not in (0, group.size()):
        raise DistributedError("not all processes were met", expected=size, found=group.size())
    return ALONE if group.size() == 1 else Ranks(group.rank(), group.size(), timeout_seconds, group)


def shard(batches: Sequence[Sequence[int]], ranks: Ranks) -> list[tuple[int, ...]]:
    """This rank's examples of each micro-batch; those that leave it nothing are left out.

    Dealt in turn over all micro-batches, so that no rank has more than one example more than another.

    Example: `(7 3 5) (1 2 9)` on two ranks is `(7 5) (2)` on rank 0 and `(3) (1 9)` on rank 1.
    """
    mine, before = [], 0
    for batch in batches:
        mine.append(tuple(batch[(ranks.rank - before) % ranks.size :: ranks.size]))
        before += len(batch)
    return [batch for batch in mine if batch]


def _blocks(arrays: Sequence[mx.array]) -> Iterator[list[mx.array]]:
    block: list[mx.array] = []
    for array in arrays:
        if block and sum(item.nbytes for item in block) + array.nbytes > BLOCK_BYTES:
            yield block
            block = []
        block.append(array)
    if block:
        yield block


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Bounds the time that what is inside may wait for other processes."""
    timer = threading.Timer(seconds, _give_up, [seconds])
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        raise DistributedError(f"a process of the run was lost: {error}", advice=LOST) from error
    finally:
        timer.cancel()


def _give_up(seconds: float) -> None:
    os.write(2, f"mlx-afm: no word from the other processes for {seconds:g} seconds. {LOST}\n".encode())
    os._exit(1)
