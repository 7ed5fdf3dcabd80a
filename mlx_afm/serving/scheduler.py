"""Admission: which requests the engines answer, and in which order.

    add(job) -> waiting -> an engine reads its prompt, a piece a round -> its rows decode, a token a round -> sinks

Rows of the base and of all LoRA adapters share one engine, and so one forward pass a token, up to `batch_size` rows;
more rows take turns in further engines. A DoRA adapter has a decoder and engines of its own. Everything here runs in
the thread that owns the model. Requests are admitted in the order in which they came, so none waits for ever because
its adapter finds no room; one prompt is read at a time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from mlx_afm.errors import AFMError, ConfigError
from mlx_afm.generation.decode import Decoder
from mlx_afm.generation.engine import STOP, Engine, Row, TokenEvent
from mlx_afm.generation.prefix_cache import PrefixCache, prefix_owner
from mlx_afm.generation.speculation import Speculation
from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.config import ServeConfig
from mlx_afm.serving.jobs import ChoiceSink, Job
from mlx_afm.serving.metrics import Metrics
from mlx_afm.serving.pool import AdapterPool

Log = Callable[[str], None]


class Scheduler:
    """All requests of a server.

    Args:
        pool: the model and its adapters.
        config: limits.
        metrics: what is counted.
        log: takes what went wrong inside.

    Attributes:
        prefixes: keys and values of the beginnings of prompts.
        waiting: requests that no engine has yet.
        speculation: the draft model of all answers, and what came of it; None if there is none.
    """

    def __init__(
        self, pool: AdapterPool, config: ServeConfig, metrics: Metrics, log: Log, speculation: Speculation | None = None
    ) -> None:
        self.pool, self._config, self._metrics, self._log = pool, config, metrics, log
        self.prefixes, self.speculation = PrefixCache(config.prefix_bytes), speculation
        self.waiting: deque[Job] = deque()
        self._started: dict[Job, list[Row]] = {}  # with the rows that are not over
        self._rows: dict[Row, tuple[Job, ChoiceSink]] = {}
        self._engines: list[Engine] = []
        pool.on_change = self._take_change

    def add(self, job: Job) -> None:
        """Takes a request."""
        self.waiting.append(job)

    @property
    def jobs(self) -> list[Job]:
        """Every request here, once."""
        return [*self._started, *self.waiting]

    @property
    def rows_in_use(self) -> int:
        """Answers under way, those whose prompt is still read included."""
        return len(self._rows)

    def work(self) -> None:
        """One round: drops what nobody waits for, admits, reads a piece of a prompt, gives one token of each row."""
        self._expire()
        self._admit()
        for engine in self._engines:
            self._step(engine)
        if not self._reading:
            self._engines = [engine for engine in self._engines if engine.busy]

    def fail_all(self, error: APIError) -> None:
        """Ends every request."""
        for job in self.jobs:
            self._fail(job, error)

    # Admission.

    @property
    def _reading(self) -> bool:
        return any(engine.reading for engine in self._engines)

    def _admit(self) -> None:
        while self.waiting and not self._reading:
            job = self.waiting[0]
            if self.rows_in_use + len(job.sinks) > self._config.rows:
                return
            if job.adapter is not None and job.adapter not in self.pool.names:
                what, found = "the adapter was removed while the request waited", repr(job.adapter)
                self.waiting.popleft().fail(APIError(404, what, code="model_not_found", param="model", found=found))
                continue
            try:
                decoder = self.pool.acquire(job.adapter)
            except (AFMError, OSError) as error:
                self._log(f"adapter {job.adapter}: {error}")
                what = f"the adapter {job.adapter!r} cannot be loaded"
                self.waiting.popleft().fail(APIError(503, what, code="adapter_unavailable"))
                continue
            if decoder is None:
                return
            self._start(self.waiting.popleft(), decoder)

    def _start(self, job: Job, decoder: Decoder) -> None:
        """Gives a request to engines with room for its rows."""
        self._started[job] = []
        engines = self._with_room(decoder, len(job.sinks))
        engines[0].overflow = engines[1:]
        try:
            rows = engines[0].add(replace(job.request, adapter=self.pool.routed_name(job.adapter)))
        except ConfigError as error:
            self._fail(job, APIError(400, str(error)))
            return
        self._started[job] = rows
        self._rows |= {row: (job, sink) for row, sink in zip(rows, job.sinks, strict=True)}

    def _with_room(self, decoder: Decoder, rows: int) -> list[Engine]:
        """Engines of a decoder that have room for so many rows together."""
        size = self._config.batch_size
        found = [engine for engine in self._engines if engine.decoder is decoder and engine.rows_in_use < size]
        free = sum(size - engine.rows_in_use for engine in found)
        while free < rows:
            engine = Engine(
                decoder,
                batch_size=size,
                prefix_cache=self.prefixes,
                routes=self.pool.routes_of(decoder),
                prompts_first=False,
                speculation=self.speculation,
            )
            found.append(engine)
            self._engines.append(engine)
            free += size
        return found

    def _take_change(self, name: str) -> None:
        """An adapter came into memory or left: its file may be another next time."""
        self.prefixes.clear(prefix_owner(None, name, self._config.kv_bits))

    # One step.

    def _step(self, engine: Engine) -> None:
        started, decodes = time.perf_counter(), bool(engine.rows)
        # A fault of one request, whatever it is, must not end the others: this is the edge at which the thread that
        # serves them all would otherwise stop.
        try:
            events = engine.step()
            over = [event.row for event in events if event.row in self._rows and self._give(event)]
        except Exception as error:
            self._recover(engine, error)
            return
        self._release(over)
        if decodes:
            self._metrics.step_seconds.observe(time.perf_counter() - started)

    def _give(self, event: TokenEvent) -> bool:
        """Hands a token on; whether the answer ends with it."""
        row, (job, sink) = event.row, self._rows[event.row]
        if event.error is not None:
            unusable = isinstance(event.error, ConfigError)  # a schema that the model's tokens cannot spell
            self._log(f"an answer broke its constraint: {event.error}")
            self._fail(job, APIError(400 if unusable else 500, str(event.error)))
            return False
        if len(row.tokens) <= 1:
            sink.start(row)
            if sink is job.sinks[0]:
                job.cached_tokens = row.cached_tokens
                self._metrics.prompt_tokens.inc(len(row.request.ids) - row.cached_tokens)
        stopped = False
        if row.tokens:
            self._metrics.completion_tokens.inc()
            stopped = sink.add(event.token)
        if stopped or event.finish_reason is not None:
            sink.end(STOP if stopped else str(event.finish_reason))
        return stopped or event.finish_reason is not None

    def _recover(self, engine: Engine, error: Exception) -> None:
        """Ends the request whose prompt was read when a step failed; if there was none, all that decoded there."""
        self._log(f"a request failed: {type(error).__name__}: {error}")
        rows = engine.rows
        if engine.reading:
            rows = self._started[next(reversed(self._started))]
        for job in dict.fromkeys(self._rows[row][0] for row in rows if row in self._rows):
            self._fail(job, APIError(500, "the model could not answer", code="internal_error"))

    # Leaving.

    def _expire(self) -> None:
        now = time.monotonic()
        for job in self.jobs:
            if job.cancelled:
                self._metrics.cancelled.inc()
                self._fail(job, APIError(499, "cancelled"), tell=False)
            elif now > job.deadline:
                seconds = f"{self._config.request_seconds:g} s"
                what = "the request took too long"
                self._fail(job, APIError(504, what, code="timeout", expected=f"within {seconds}"))

    def _fail(self, job: Job, error: APIError, *, tell: bool = True) -> None:
        """Ends one request, wherever it is."""
        if tell:
            job.fail(error)
        if job not in self._started:
            self.waiting.remove(job)
        elif rows := self._started[job]:
            self._release(list(rows))
        else:
            self._end(job)

    def _release(self, rows: Sequence[Row]) -> None:
        """Takes rows out of their engines; a request without rows is over, and its adapter may leave."""
        if not rows:
            return
        for engine in self._engines:
            engine.remove(rows)
        for row in rows:
            job, _ = self._rows.pop(row, (None, None))
            if job is not None:
                self._started[job].remove(row)
                if not self._started[job]:
                    self._end(job)

    def _end(self, job: Job) -> None:
        del self._started[job]
        self.pool.release(job.adapter)
