"""Preparing blocks in several processes.

Not `concurrent.futures`: its processes import the user's main module again, so that a script without
an `if __name__ == "__main__"` guard would start itself over; forking a process that holds a GPU is
worse. A worker here is the same Python running `serve`, and speaks pickle over its pipes.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from queue import SimpleQueue
from threading import get_ident
from typing import Any

from mlx_afm.data.blocks import Block
from mlx_afm.data.config import DataConfig
from mlx_afm.data.prepare import Prepared, Preparer
from mlx_afm.errors import AFMError, ConfigError
from mlx_afm.files import to_path
from mlx_afm.text.tokenizer import AFMTokenizer

MAX_WORKERS = 8
SERIAL_BLOCKS = 32  # 16 MB; up to here starting workers costs more than it saves


def prepare_all(
    blocks: Iterator[Block],
    config: DataConfig,
    tokenizer: AFMTokenizer | None,
    *,
    want_tokens: bool,
    workers: int | None = None,
) -> Iterator[Prepared]:
    """What became of each block, in order; little data is prepared in this process, more in others.

    In this process it is SentencePiece alone that uses more than one processor, in threads.

    Args:
        blocks: from `iter_blocks`.
        config: how to read.
        tokenizer: None encodes nothing.
        want_tokens: whether the tokens themselves are wanted, or only what is counted.
        workers: how many processes, or threads; as many as there are processors, up to eight, if None.

    Raises:
        ConfigError: the transform cannot be found, or a worker died.
        FormatError: a file cannot be read.
    """
    workers = min(os.cpu_count() or 1, MAX_WORKERS) if workers is None else workers
    first = list(islice(blocks, SERIAL_BLOCKS))
    blocks = chain(first, blocks)
    if workers < 2 or len(first) < SERIAL_BLOCKS:
        if tokenizer is not None:
            tokenizer.threads = max(workers, 1)
        preparer = Preparer(config, tokenizer, want_tokens=want_tokens)
        yield from map(preparer, blocks)
        return
    Preparer(config, None, want_tokens=False)  # a transform that is not there is this process's error
    setup = (config, None if tokenizer is None else tokenizer.file, want_tokens)
    pool = [_Worker(setup) for _ in range(workers)]
    try:
        yield from _in_order(blocks, pool)
    finally:
        for worker in pool:
            worker.stop()


def to_tokenizer(tokenizer: AFMTokenizer | str | Path) -> AFMTokenizer:
    """The tokenizer itself, or that of a file.

    A file is read once for all splits that are read one after the other, and again if it changed.
    """
    if isinstance(tokenizer, AFMTokenizer):
        return tokenizer
    path = to_path(tokenizer)
    try:
        stamp = path.stat().st_mtime_ns, path.stat().st_size
    except OSError:
        return AFMTokenizer.from_file(path)  # which says what is wrong
    return _same_file(path.absolute(), stamp, get_ident())


@lru_cache(maxsize=1)
def _same_file(path: Path, _: tuple[int, int], __: int) -> AFMTokenizer:
    """Each thread has its own: a tokenizer that learns words is not for two at a time."""
    return AFMTokenizer.from_file(path)


def _in_order(blocks: Iterator[Block], pool: list[_Worker]) -> Iterator[Prepared]:
    """Two blocks a worker are under way, so that none waits and memory stays small."""
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in pool:
        idle.put(worker)

    def ask(block: Block) -> Prepared:
        worker = idle.get()
        try:
            return worker.ask(block)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(len(pool)) as threads:
        waiting: deque[Future[Prepared]] = deque()
        for block in blocks:
            waiting.append(threads.submit(ask, block))
            if len(waiting) >= 2 * len(pool):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Worker:
    """A process that prepares blocks."""

    def __init__(self, setup: tuple[Any, ...]) -> None:
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
        # Where this process finds modules, the transform's among them, the worker does too.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        self._send(setup)

    def ask(self, block: Block) -> Prepared:
        """What becomes of the block."""
        self._send(block)
        try:
            answer = pickle.load(self._process.stdout)  # type: ignore[arg-type]
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._died() from error
        if isinstance(answer, AFMError):
            raise answer
        assert isinstance(answer, Prepared)
        return answer

    def _send(self, value: object) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(value, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._died() from error

    def _died(self) -> ConfigError:
        advice = "Its last words are above; too little memory, or a transform that ends the process?"
        return ConfigError(
            "a process that prepares the data ended", found=f"exit code {self._process.wait()}", advice=advice
        )

    def stop(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self._process.kill()
        self._process.wait()


def serve() -> None:
    """A worker's life: the setup, then a block in, a result out, until the pipe closes."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a transform prints must not land in the pipe
    config, tokenizer_file, want_tokens = pickle.load(requests)
    tokenizer = None if tokenizer_file is None else AFMTokenizer.from_file(tokenizer_file)
    preparer = Preparer(config, tokenizer, want_tokens=want_tokens)
    while True:
        try:
            block = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(preparer(block), answers)
        answers.flush()
