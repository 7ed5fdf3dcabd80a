"""What is counted, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from mlx_afm.serving.scheduler import Scheduler

PREFIX = "mlx_afm"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
Sample = tuple[str, str, float]  # name, help, value


class Metrics:
    """Counters and histograms of one server; any thread may add to them.

    Attributes:
        registry: of Prometheus.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, labels, namespace=PREFIX, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, namespace=PREFIX, buckets=SECONDS, registry=self.registry)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed.")
        self.completion_tokens = counter("completion_tokens", "Tokens generated.")
        self.cancelled = counter("cancelled", "Requests whose client hung up.")
        self.requests = counter("requests", "HTTP requests answered, by path and status.", ("path", "status"))
        self.step_seconds = histogram("step_seconds", "Time of one token for all rows of a batch.")
        self.first_token_seconds = histogram("first_token_seconds", "From a request to the first token of its answer.")
        self.request_seconds = histogram("request_seconds", "From a request to the end of its answer.")
        self._answers, self._answer_seconds = 0, 0.0

    def add_request(self, seconds: float) -> None:
        """Counts an answer that ended; for the thread that owns the model alone."""
        self.request_seconds.observe(seconds)
        self._answers, self._answer_seconds = self._answers + 1, self._answer_seconds + seconds

    @property
    def mean_request_seconds(self) -> float:
        """From a request to the end of its answer; 0 before there was one."""
        return self._answer_seconds / max(1, self._answers)


class SchedulerCollector:
    """What only the thread that owns the model knows, as it was when `samples` was asked last."""

    def __init__(self, samples: Callable[[], tuple[list[Sample], list[Sample]]]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Any]:
        """The metrics, as Prometheus's registry wants them."""
        counters, gauges = self._samples()
        for name, text, value in counters:
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)


def scheduler_samples(scheduler: Scheduler) -> tuple[list[Sample], list[Sample]]:
    """Counters and gauges of a scheduler, its adapters and MLX's memory."""
    steps, pool, prefixes = scheduler.pool.decoder.counters, scheduler.pool, scheduler.prefixes
    counters: list[Sample] = [
        ("plain_steps", "Forward passes that gave rows a token, not compiled.", steps.plain_steps),
        ("compiled_steps", "Compiled forward passes that gave rows a token.", steps.compiled_steps),
        ("traces", "Times that the compiled step was traced.", steps.traces),
        ("prefix_hits", "Prompts whose prefix was not computed again.", prefixes.hits),
        ("prefix_misses", "Prompts whose prefix was computed.", prefixes.misses),
    ]
    if (speculation := scheduler.speculation) is not None:
        counters.append(("draft_tokens", "Tokens that the draft model proposed.", speculation.drafted))
        counters.append(("accepted_draft_tokens", "Proposed tokens that were accepted.", speculation.accepted))
    return counters, [
        ("rows", "Answers under way.", scheduler.rows_in_use),
        ("waiting", "Requests that wait.", len(scheduler.waiting)),
        ("adapter_bytes", "Memory of adapters.", pool.held_bytes),
        ("prefix_bytes", "Memory of keys and values of prompt prefixes.", prefixes.held_bytes),
        ("active_memory_bytes", "Memory of MLX's arrays.", mx.get_active_memory()),
        ("peak_memory_bytes", "The most that MLX's arrays took.", mx.get_peak_memory()),
        ("cache_memory_bytes", "Memory that MLX keeps for reuse.", mx.get_cache_memory()),
    ]
