"""What is counted, in the text form that Prometheus reads."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping

PREFIX = "mlx_afm_"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTERS = {
    "prompt_tokens": "Prompt tokens computed.",
    "completion_tokens": "Tokens generated.",
    "cancelled": "Requests whose client hung up.",
}
REQUESTS = "HTTP requests answered, by path and status."
HISTOGRAMS = {
    "step_seconds": "Time of one token for all rows of a batch.",
    "first_token_seconds": "From a request to the first token of its answer.",
    "request_seconds": "From a request to the end of its answer.",
}


class Metrics:
    """Counters and histograms that any thread may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._requests: dict[tuple[str, int], int] = {}
        self._buckets = {name: [0] * (len(SECONDS) + 1) for name in HISTOGRAMS}
        self._sums = dict.fromkeys(HISTOGRAMS, 0.0)

    def count(self, name: str, amount: int = 1) -> None:
        """Adds to a counter."""
        with self._lock:
            self._counts[name] += amount

    def request(self, path: str, status: int) -> None:
        """Counts an answered request."""
        with self._lock:
            self._requests[path, status] = self._requests.get((path, status), 0) + 1

    def observe(self, name: str, seconds: float) -> None:
        """Adds to a histogram."""
        with self._lock:
            self._buckets[name][bisect_left(SECONDS, seconds)] += 1
            self._sums[name] += seconds

    def mean(self, name: str) -> float:
        """Mean of a histogram; 0 of nothing."""
        with self._lock:
            return self._sums[name] / max(1, sum(self._buckets[name]))

    def text(self, gauges: Mapping[str, tuple[float, str]], counters: Mapping[str, tuple[float, str]]) -> str:
        """Everything, with gauges and counters (value, help) that only their owner knows."""
        with self._lock:
            lines = [line for name, (value, said) in gauges.items() for line in _plain(name, "gauge", said, value)]
            counts = {name: (self._counts[name], said) for name, said in COUNTERS.items()}
            for name, (value, said) in (counts | dict(counters)).items():
                lines += _plain(f"{name}_total", "counter", said, value)
            lines += _head("requests_total", "counter", REQUESTS)
            for (path, status), count in sorted(self._requests.items()):
                lines.append(f'{PREFIX}requests_total{{path="{path}",status="{status}"}} {count}')
            for name, said in HISTOGRAMS.items():
                lines += [*_head(name, "histogram", said), *self._histogram(name)]
        return "\n".join(lines) + "\n"

    def _histogram(self, name: str) -> list[str]:
        lines, total = [], 0
        for edge, count in zip((*SECONDS, "+Inf"), self._buckets[name]):
            total += count
            lines.append(f'{PREFIX}{name}_bucket{{le="{edge}"}} {total}')
        return [*lines, f"{PREFIX}{name}_sum {self._sums[name]:.6f}", f"{PREFIX}{name}_count {total}"]


def _head(name: str, kind: str, said: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {said}", f"# TYPE {PREFIX}{name} {kind}"]


def _plain(name: str, kind: str, said: str, value: float) -> list[str]:
    return [*_head(name, kind, said), f"{PREFIX}{name} {value:g}" if value < 1e6 else f"{PREFIX}{name} {value:.0f}"]
