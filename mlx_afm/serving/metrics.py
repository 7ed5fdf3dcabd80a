"""What is counted, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

PREFIX = "mlx_afm"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


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
