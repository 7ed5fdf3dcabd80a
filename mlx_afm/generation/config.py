"""Settings of generation, with their defaults and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_afm.data.config import CONTEXT_TOKENS
from mlx_afm.errors import ConfigError, SettingError


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How to pick tokens and when to stop.

    Attributes:
        max_tokens: of the answer.
        temp: temperature; 0 is greedy.
        top_p, top_k, min_p: narrow the choice; 0 for top_k and min_p and 1 for top_p leave it.
        seed: of the choice; with the number of the token in the answer it says all that is random about it.
        stop: texts that end the answer; neither they nor what follows is given out.
        kv_bits: 8 holds keys and values as the int8 numbers that the model rounds them to, in half the
            memory of 16 bits; the answer is the same. None for the dtype of the model.
        prefill_step_size: tokens of a prompt that are computed at once; fewer take less memory.
        context_tokens: the longest prompt and answer together; an answer that reaches it ends there.

    Raises:
        SettingError: settings out of range.
    """

    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    kv_bits: int | None = None
    prefill_step_size: int = 2048
    context_tokens: int = CONTEXT_TOKENS

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise SettingError("generation settings out of range", details=faults)

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
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            yield f"stop: expected texts that are not empty, found {self.stop!r}"
        if self.kv_bits not in (None, 8):
            yield f"kv_bits: expected 8, which is what the model rounds to, or none, found {self.kv_bits}"
        if self.prefill_step_size < 1:
            yield f"prefill_step_size: expected at least 1, found {self.prefill_step_size}"
        if not 2 <= self.context_tokens <= CONTEXT_TOKENS:
            yield f"context_tokens: expected from 2 to {CONTEXT_TOKENS}, found {self.context_tokens}"

    def answer_tokens(self, prompt_tokens: int) -> int:
        """The longest answer to a prompt: `max_tokens`, or what is left of the context.

        Raises:
            ConfigError: nothing is left.
        """
        left = self.context_tokens - prompt_tokens
        if left < 1:
            raise ConfigError(
                "the prompt leaves no room for an answer in the model's context",
                expected=f"at most {self.context_tokens - 1} tokens",
                found=f"{prompt_tokens} tokens",
                advice="Shorten the prompt.",
            )
        return min(self.max_tokens, left)


def require_fitting(config: GenerateConfig, model: Any) -> None:
    """Raises ConfigError for settings that this model has no meaning for."""
    if config.top_k >= model.args.vocab_size:
        expected = f"less than the {model.args.vocab_size} tokens there are, or 0 for all"
        raise SettingError("top_k is too large", expected=expected, found=config.top_k)
