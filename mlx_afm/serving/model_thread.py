"""The thread that owns the model: MLX's arrays and streams belong to one, and everything else asks it."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from mlx_afm.files import to_path
from mlx_afm.model_folder import ModelFolder
from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.config import ServeConfig
from mlx_afm.serving.jobs import Job
from mlx_afm.serving.metrics import Metrics
from mlx_afm.serving.pool import AdapterPool, PooledAdapter
from mlx_afm.serving.scheduler import Log, Scheduler
from mlx_afm.text.system_prompt import default_system_prompt, system_prompt_notice
from mlx_afm.workflows.draft_model import load_draft

T = TypeVar("T")


class ModelThread:
    """A loaded model in a thread of its own.

    Args:
        model: its folder, or hub id.
        adapters: by name, where each is on disk.
        config: limits.
        metrics: what is counted.
        log: takes what went wrong inside.

    The constructor returns when everything is loaded, and raises what loading raised.
    """

    def __init__(
        self, model: str | Path, adapters: dict[str, Path], config: ServeConfig, metrics: Metrics, log: Log
    ) -> None:
        self.config, self._metrics, self._log = config, metrics, log
        self.folder = ModelFolder(model)
        self.model_id = config.model_id or (self.folder.path.resolve().name if to_path(model).exists() else str(model))
        self.tokenizer = self.folder.require_tokenizer()
        self._arrivals: deque[Job] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()  # guards everything above and below
        self._accepting = True
        self._stop_at: float | None = None
        self._under_way = 0
        self._scheduler: Scheduler
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(adapters, ready), name="mlx-afm-model", daemon=True)
        self._thread.start()
        ready.result()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that can be asked for."""
        return self._scheduler.pool.names

    def system_prompt(self, model: str) -> str | None:
        """The system prompt of conversations without a system message, by model id; None for no system turn."""
        if self.config.system is not None:
            return self.config.system or None
        return default_system_prompt(self._scheduler.pool.system_prompts(model))

    def warn_of(self, entry: PooledAdapter) -> None:
        """Logs a warning of an adapter without effect, or whose system prompt is left open by the settings too."""
        if entry.has_no_effect:
            self._log(f"{entry.path}: the adapter has no effect: all its B matrices are zero.")
        notice = system_prompt_notice(entry.system_prompts, entry.path)
        if notice is not None and self.config.system is None:
            self._log(notice)

    @property
    def vocabulary(self) -> int:
        """Rows of the model's embedding: no token has a larger id."""
        return self._vocabulary

    def submit(self, job: Job) -> None:
        """Takes a request; its sinks are told from the model's thread.

        Raises:
            APIError: too many are waiting (429), or the server is stopping (503).
        """
        with self._wake:
            if not self._accepting:
                raise APIError(503, "the server is stopping", code="stopping", retry_seconds=5)
            limit = self.config.rows + self.config.queue
            if self.answers_in_flight + len(job.sinks) > limit:
                seconds = max(1, math.ceil(self._metrics.mean_request_seconds))
                raise APIError(
                    429,
                    "too many requests are waiting",
                    code="queue_full",
                    retry_seconds=seconds,
                    expected=f"at most {limit} answers under way and waiting",
                    advice="Try again later.",
                )
            self._arrivals.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this request any more."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def call(self, work: Callable[[Scheduler], T]) -> Future[T]:
        """Has the model's thread do something between two rounds."""
        future: Future[T] = Future()

        def run() -> None:
            # What it raises belongs to whoever asked.
            try:
                future.set_result(work(self._scheduler))
            except Exception as error:
                future.set_exception(error)

        with self._wake:
            if not self._thread.is_alive():
                future.set_exception(APIError(503, "the server is stopping", code="stopping"))
                return future
            self._calls.append(run)
            self._wake.notify()
        return future

    def stop(self, grace_seconds: float) -> None:
        """Lets requests under way finish within some time, ends the rest, and the thread."""
        with self._wake:
            end = time.monotonic() + grace_seconds
            self._accepting, self._stop_at = False, end if self._stop_at is None else min(end, self._stop_at)
            self._wake.notify()
        self._thread.join()

    @property
    def answers_in_flight(self) -> int:
        """Answers under way and waiting."""
        return self._under_way + sum(len(job.sinks) for job in tuple(self._arrivals))

    # The thread.

    def _run(self, adapters: dict[str, Path], ready: Future[None]) -> None:
        # Loading may fail in any way that reading files can; whoever started the thread is told.
        try:
            self._scheduler = self._load(adapters)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        while self._turn():
            pass
        self._scheduler.fail_all(APIError(503, "the server stopped", code="stopping"))
        mx.synchronize()

    def _load(self, adapters: dict[str, Path]) -> Scheduler:
        model = self.folder.load_model()
        mx.eval(model.parameters())
        model.make_cache(quantized=self.config.kv_bits is not None)  # says that a model has no int8 cache
        self._vocabulary = model.args.vocab_size
        own = self.folder.active_base_adapter
        speculation = None
        if (draft := self.config.draft_model) is not None:
            speculation = load_draft(draft, model, self.tokenizer, self.config.num_draft_tokens)
        pool = AdapterPool(model, self.folder, self.config.adapter_bytes, own=own, reserved=self.model_id)
        for name, path in adapters.items():
            self.warn_of(pool.register(name, path))
        return Scheduler(pool, self.config, self._metrics, self._log, speculation)

    def _turn(self) -> bool:
        """One round; False when it is time to end."""
        with self._wake:
            while not (self._arrivals or self._calls or self._scheduler.jobs or self._stop_at is not None):
                self._wake.wait()
            calls = list(self._calls)
            self._calls.clear()
            self._under_way = self.answers_in_flight
            while self._arrivals:
                self._scheduler.add(self._arrivals.popleft())
        for call in calls:
            call()
        self._scheduler.work()
        with self._wake:
            self._under_way = sum(len(job.sinks) for job in self._scheduler.jobs)
            if self._stop_at is None:
                return True
            over = not (self._under_way or self._arrivals or self._calls)
            return not over and time.monotonic() < self._stop_at
