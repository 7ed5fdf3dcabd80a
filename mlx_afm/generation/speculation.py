"""How far a draft model runs ahead, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_afm.errors import ConfigError, SettingError
from mlx_afm.generation.decode import Decoder
from mlx_afm.generation.draft_length import LENGTHS, DraftLength
from mlx_afm.generation.forms import ModelDecoder, decoder_of
from mlx_afm.generation.prefix_cache import PrefixCache
from mlx_afm.model import Model
from mlx_afm.text.tokenizer import AFMTokenizer


@dataclass(kw_only=True)
class Speculation:
    """A draft model, how many tokens it proposes at a time, and counts over all answers.

    Attributes:
        draft: the draft model; its vocabulary is the target's.
        num_draft_tokens: proposed in each round; None adapts it to what is accepted and to measured times, down to
            none.
        rounds: passes of the target over proposals.
        row_rounds: the rows of all of them together.
        drafted: tokens proposed, over all rows; none counts that would stand behind the last of an answer.
        accepted: of these, how many the target took.
        seconds: that rounds took, but for the first, which compiles kernels.
        compares: whether the engine times plain steps too, behind an answer, to tell the speed-up.
        plain_step_seconds: what such a step takes, once it was timed.
        prefixes: the draft's keys and values of earlier prompts.
        clock: gives the seconds by which the number adapts.

    Raises:
        ConfigError: fewer than one token.
    """

    draft: Model
    num_draft_tokens: int | None = 5
    rounds: int = 0
    row_rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    compares: bool = False
    plain_step_seconds: float | None = None
    prefixes: PrefixCache = field(default_factory=PrefixCache, repr=False)
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False)
    _timed_tokens: float = field(default=0.0, repr=False)
    _lengths: DraftLength | None = field(default=None, repr=False)
    _held: ModelDecoder | None = field(default=None, repr=False)
    _decoder: Decoder | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.num_draft_tokens is not None and self.num_draft_tokens < 1:
            raise SettingError("num_draft_tokens out of range", expected="at least 1", found=self.num_draft_tokens)

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the proposed tokens that were taken; None if there were none."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float | None:
        """Tokens that one pass of the target gave a row: those taken and one of its own. 1 is what it gives alone."""
        return 1 + self.accepted / self.row_rounds if self.row_rounds else None

    @property
    def speed_up(self) -> float | None:
        """Time of as many plain steps, as a multiple of the time of the rounds; None if not both were timed."""
        if self.plain_step_seconds is None or not self.seconds:
            return None
        return self.plain_step_seconds * self._timed_tokens / self.seconds

    @property
    def wants_plain_time(self) -> bool:
        """Whether there is something to compare with plain steps that were not timed yet."""
        return self.compares and self.plain_step_seconds is None and self.rounds > 1

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of proposals that rounds have: few, because a compiled step is traced for each."""
        fixed = self.num_draft_tokens
        return LENGTHS if fixed is None else (*(length for length in LENGTHS if length < fixed), fixed)

    def adaptive_length(self, target: Model) -> DraftLength | None:
        """What chooses the number of proposals for a target; None if the number is fixed."""
        if self.num_draft_tokens is None and self._lengths is None:
            self._lengths = DraftLength(len(self.draft.layers) / len(target.layers), self.clock)
        return self._lengths

    def draft_decoder(self, target: Decoder) -> ModelDecoder:
        """The draft's decoder and the route of its own adapter; compiled as the target's is."""
        held = decoder_of(self.draft)
        if self._held is None or self._held.decoder.form is not held.decoder.form:
            self._held, self._decoder = held, None
            self.prefixes.clear()
        decoder = self._decoder or held.decoder
        if (decoder.compiled, decoder.plain_steps) != (target.compiled, target.plain_steps):
            decoder = Decoder(held.decoder.form, compiled=target.compiled, plain_steps=target.plain_steps)
        self._decoder = decoder
        return ModelDecoder(decoder, held.route, held.arrays)

    def add_round(self, drafted: int, accepted: int, seconds: float = 0.0, *, rows: int = 1) -> None:
        """Counts a round: the proposals and the accepted ones of all its rows."""
        if self.rounds:
            self.seconds, self._timed_tokens = self.seconds + seconds, self._timed_tokens + accepted / rows + 1
        self.rounds, self.row_rounds = self.rounds + 1, self.row_rounds + rows
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted

    def summary(self) -> dict[str, Any]:
        """The counts and rates, for reports."""
        return {
            "rounds": self.rounds,
            "draft_tokens": self.drafted,
            "accepted_tokens": self.accepted,
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_round": self.tokens_per_round,
            "speed_up": self.speed_up,
        }


def require_pair(
    target: Model, draft: Model, tokenizer: AFMTokenizer | None = None, draft_tokenizer: AFMTokenizer | None = None
) -> None:
    """Raises ConfigError unless an id means the same to both models."""
    advice = "A draft model has the target's tokenizer; name the one that was made for it."
    sizes = [model.args.vocab_size for model in (target, draft)]
    if sizes[0] != sizes[1]:
        expected, found = (f"{size} tokens" for size in sizes)
        raise ConfigError("the draft model has another vocabulary", expected=expected, found=found, advice=advice)
    if tokenizer is None or draft_tokenizer is None:
        return
    theirs, ours = draft_tokenizer.get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        other = next(piece for piece in [*ours, *theirs] if ours.get(piece) != theirs.get(piece))
        found = f"{other!r} is {ours.get(other, 'none')} here and {theirs.get(other, 'none')} there"
        raise ConfigError("the draft model has another tokenizer", found=found, advice=advice)
