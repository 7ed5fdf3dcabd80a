"""What the scheduler counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from mlx_afm.serving.metrics import PREFIX
from mlx_afm.serving.scheduler import Scheduler

Sample = tuple[str, str, float]  # name, help, value


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
