"""Who is next: requests into prompts under way into batches of rows, each batch with its adapter.

    add(job) -> waiting -> prefill, a piece of one prompt a round -> a row of a batch, one token a round -> sink

Everything here runs in the thread that owns the model. Requests are admitted in the order they came, so none waits
for ever because its adapter finds no room.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import mlx.core as mx

from mlx_afm.errors import AFMError, ConfigError
from mlx_afm.model import Model
from mlx_afm.model.cache import KVCache
from mlx_afm.serving.adapters import AdapterSwitch
from mlx_afm.serving.batches import Batch, Prefill, Row
from mlx_afm.serving.config import ServeConfig
from mlx_afm.serving.jobs import Job, Said
from mlx_afm.serving.metrics import Metrics
from mlx_afm.serving.pool import AdapterPool
from mlx_afm.serving.prefix import PrefixCache
from mlx_afm.serving.refusal import Refusal
from mlx_afm.serving.sampling import Chooser, Chosen, changed_logits, choose_next

STEPS_TO_TIDY = 256  # freed memory is given back after so many
Log = Callable[[str], None]


class Scheduler:
    """All requests in the model's hands.

    Args:
        model: the base, on which `switch` works.
        switch, pool: its adapters.
        base: the adapter of the base itself, by its name in `switch`, if it has one.
        config: limits.
        metrics: what is counted.
        log: takes what went wrong inside.
    """

    def __init__(
        self,
        model: Model,
        switch: AdapterSwitch,
        pool: AdapterPool,
        config: ServeConfig,
        metrics: Metrics,
        log: Log,
        *,
        base: str | None = None,
    ) -> None:
        self._model, self._switch, self.pool, self._config, self._base = model, switch, pool, config, base
        self._metrics, self._log = metrics, log
        self.prefixes = PrefixCache(config.prefix_bytes)
        self.waiting: deque[Job] = deque()
        self._prompts: deque[Prefill] = deque()
        self._batches: list[Batch] = []
        self._steps = 0
        self._holders: set[Job] = set()  # requests whose adapter must stay

    def add(self, job: Job) -> None:
        """Takes a request."""
        self.waiting.append(job)

    @property
    def jobs(self) -> list[Job]:
        """Every request here, once."""
        under_way = [prompt.job for prompt in self._prompts]
        rows = [row.job for batch in self._batches for row in batch.rows]
        return list(dict.fromkeys([*rows, *under_way, *self.waiting]))

    @property
    def rows_in_use(self) -> int:
        """Answers under way, those whose prompt is still read included."""
        return sum(len(p.job.sinks) for p in self._prompts) + sum(len(batch.rows) for batch in self._batches)

    def work(self) -> None:
        """One round: drops what nobody waits for, admits, reads a piece of a prompt, says one token per row."""
        self._expire()
        self._admit()
        if self._prompts:
            prompt = self._prompts[0]
            self._guarded([prompt.job], lambda: self._read(prompt))
        for batch in list(self._batches):
            jobs = list(dict.fromkeys(row.job for row in batch.rows))
            self._guarded(jobs, lambda batch=batch: self._step(batch))  # type: ignore[misc]

    def fail_all(self, error: Refusal) -> None:
        """Ends every request."""
        for job in self.jobs:
            self._fail(job, error)

    # One request's way.

    def _admit(self) -> None:
        while self.waiting:
            job = self.waiting[0]
            if self.rows_in_use + len(job.sinks) > self._config.rows:
                return
            try:
                if job.adapter is not None and not self._acquire(job.adapter):
                    return
            except (AFMError, OSError) as error:
                self._log(f"adapter {job.adapter}: {error}")
                self.waiting.popleft()
                _tell(job, Refusal(503, f"the adapter {job.adapter!r} cannot be loaded", code="adapter_unavailable"))
                continue
            self._start(self.waiting.popleft())

    def _acquire(self, name: str) -> bool:
        loaded = name in self._switch
        if not self.pool.acquire(name):
            return False
        if not loaded:  # its file may be another than last time
            self.prefixes.forget(name)
        return True

    def _start(self, job: Job) -> None:
        self._holders.add(job)
        prompt = Prefill(job, self._caches())
        prompt.done = job.cached_tokens = self.prefixes.restore(job.adapter, job.ids, job.cuts, prompt.caches)
        self._prompts.append(prompt)

    def _caches(self) -> list[KVCache]:
        return self._model.make_cache(quantized=self._config.kv_bits is not None)

    def _read(self, prompt: Prefill) -> None:
        """Reads the next piece of a prompt; after the last one its rows join a batch."""
        job, start = prompt.job, prompt.done
        cut = next((cut for cut in job.cuts if cut > start), len(job.ids))
        end = min(cut, start + self._config.prefill_tokens)
        self._use(job.adapter)
        logits = self._model.next_logits(mx.array([job.ids[start:end]]), prompt.caches)
        prompt.done = end
        self._metrics.count("prompt_tokens", end - start)
        if end < len(job.ids):
            mx.eval([cache.state for cache in prompt.caches])
        else:
            self._begin(prompt, logits)
        if job.cuts and end in (
            job.cuts[0],
            job.cuts[-1],
        ):  # what everyone has, and what this conversation comes back with
            self.prefixes.store(job.adapter, job.ids[:end], prompt.caches)
        if end == len(job.ids):
            self._prompts.popleft()

    def _begin(self, prompt: Prefill, logits_1V: mx.array) -> None:
        """Gives each answer a row; its first token is chosen and will be said with the next step."""
        job = prompt.job
        rows = [Row(job, sink, self._chooser(job, index)) for index, sink in enumerate(job.sinks)]
        chosen = self._choose(rows, mx.repeat(logits_1V, len(rows), axis=0), unread=0)
        for index, row in enumerate(rows):
            self._join(row, prompt.caches, chosen.rows([index]))
        self._end_faulty(rows)

    def _join(self, row: Row, caches: list[KVCache], chosen: Chosen) -> None:
        """Gives a row its place in a batch with room."""
        for batch in self._batches:
            if batch.adapter == row.job.adapter and len(batch.rows) < self._config.batch_size:
                batch.join(row, caches, chosen)
                return
        self._batches.append(Batch.of(row, caches, chosen))

    def _chooser(self, job: Job, index: int) -> Chooser:
        return Chooser(job.sampling, index, None if job.processor is None else job.processor())

    def _step(self, batch: Batch) -> None:
        """Says a token of each row and has the next ones computed: meanwhile, unless they depend on what is said."""
        started = time.perf_counter()
        self._use(batch.adapter)
        chosen, rows = batch.chosen, batch.rows
        ahead = not any(row.chooser.changes_logits for row in rows)
        if ahead and any(len(row.chooser.said) + 1 < row.job.max_tokens for row in rows):
            batch.chosen = self._follow(batch, unread=1)
        self._keep(batch, [not self._say(row, said) for row, said in zip(rows, chosen.read())])
        if not ahead and batch.rows:
            batch.chosen = self._follow(batch, unread=0)
            self._end_faulty(list(batch.rows))
        self._metrics.observe("step_seconds", time.perf_counter() - started)
        self._steps += 1
        if self._steps % STEPS_TO_TIDY == 0:
            mx.clear_cache()

    def _follow(self, batch: Batch, *, unread: int) -> Chosen:
        """The tokens after those that were chosen last."""
        logits = self._model.next_logits(batch.chosen.tokens_B[:, None], batch.caches)
        return self._choose(batch.rows, logits, unread=unread)

    def _choose(self, rows: list[Row], logits_BV: mx.array, *, unread: int) -> Chosen:
        choosers = [row.chooser for row in rows]
        changed_BV, faults = changed_logits(choosers, logits_BV)
        for index, error in faults.items():
            rows[index].fault = error
        return choose_next(choosers, logits_BV, changed_BV, unread=unread)

    def _end_faulty(self, rows: list[Row]) -> None:
        """Ends the requests whose logits could not be changed as they wanted."""
        for row in rows:
            if row.fault is not None:
                wanted = isinstance(row.fault, ConfigError)  # a schema that the model's tokens cannot spell
                self._log(f"an answer left its form: {row.fault}")
                self._fail(row.job, Refusal(400 if wanted else 500, str(row.fault)))

    def _say(self, row: Row, said: Said) -> bool:
        """Hands a token on; whether the answer ends with it."""
        tokens = row.chooser.said
        tokens.append(said.token)
        self._metrics.count("completion_tokens")
        if said.token in row.job.ends or row.sink.token(said):
            row.sink.end("stop", len(tokens))
        elif len(tokens) >= row.job.max_tokens:
            row.sink.end("length", len(tokens))
        else:
            return False
        return True

    # Leaving.

    def _keep(self, batch: Batch, stays: list[bool]) -> None:
        """Drops the rows that do not stay, and their requests' adapters once no row needs them."""
        if all(stays):
            return
        before = [row.job for row in batch.rows]
        batch.keep(stays)
        if not batch.rows:
            self._batches.remove(batch)
        left = {id(row.job) for other in self._batches for row in other.rows}
        for job in dict.fromkeys(before):
            if id(job) not in left:
                self._release(job)

    def _expire(self) -> None:
        now = time.monotonic()
        for job in self.jobs:
            if job.cancelled:
                self._metrics.count("cancelled")
                self._fail(job, Refusal(499, "cancelled"), tell=False)
            elif now > job.deadline:
                seconds = f"{self._config.request_seconds:g} s"
                self._fail(job, Refusal(504, "the request took too long", code="timeout", expected=f"within {seconds}"))

    def _fail(self, job: Job, error: Refusal, *, tell: bool = True) -> None:
        """Ends one request, wherever it is."""
        if tell:
            _tell(job, error)
        if job in self.waiting:
            self.waiting.remove(job)
            return
        for prompt in [prompt for prompt in self._prompts if prompt.job is job]:
            self._prompts.remove(prompt)
            self._release(job)
        for batch in list(self._batches):
            self._keep(batch, [row.job is not job for row in batch.rows])

    def _release(self, job: Job) -> None:
        if job in self._holders:
            self._holders.discard(job)
            if job.adapter is not None:
                self.pool.release(job.adapter)

    def _use(self, adapter: str | None) -> None:
        self._switch.use(self._base if adapter is None else adapter)

    def _guarded(self, jobs: list[Job], work: Callable[[], None]) -> None:
        # A fault of one request, whatever it is (no memory, a schema that trips its processor), must not end the
        # others: this is the edge at which the thread that serves them all would otherwise stop.
        try:
            work()
        except Exception as error:
            self._log(f"a request failed: {type(error).__name__}: {error}")
            for job in jobs:
                self._fail(job, Refusal(500, "the model could not answer", code="internal_error"))


def _tell(job: Job, error: Refusal) -> None:
    for sink in job.sinks:
        sink.fail(error)
