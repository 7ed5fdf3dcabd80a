"""Settings of generation, with their defaults and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlx_afm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How to pick tokens and when to stop.

    Attributes:
        max_tokens: of the answer.
        temp: temperature; 0 is greedy.
        top_p, top_k, min_p: narrow the choice; 0 for top_k and min_p and 1 for top_p leave it.
        seed: of the sampler.
        kv_bits: 8 holds keys and values as the int8 numbers that the model rounds them to, in half the
            memory of 16 bits; the answer is the same. None for the dtype of the model.

    Raises:
        ConfigError: settings out of range.
    """

    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    kv_bits: int | None = None

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise ConfigError("generation settings out of range", details=faults)

    def _faults(self) -> Iterator[str]:
        if self.max_tokens < 1:
            yield f"max_tokens: expected at least 1, found {self.max_tokens}"
        if not self.temp >= 0:
            yield f"temp: expected at least 0, found {self.temp}"
        if not 0 < self.top_p <= 1:
            yield f"top_p: expected more than 0 and at most 1, found {self.top_p}"
        if self.top_k < 0:
            yield f"top_k: expected at least 0, found {self.top_k}"
        if not 0 <= self.min_p < 1:
            yield f"min_p: expected from 0 to less than 1, found {self.min_p}"
        if not 0 <= self.seed < 2**64:
            yield f"seed: expected from 0 to less than 2**64, found {self.seed}"
        if self.kv_bits not in (None, 8):
            yield f"kv_bits: expected 8, which is what the model rounds to, or none, found {self.kv_bits}"
