"""How far a draft model runs ahead, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlx_afm.errors import ConfigError, SettingError
from mlx_afm.model import Model
from mlx_afm.text.tokenizer import AFMTokenizer

MOST_DRAFT_TOKENS = 16  # of a number that adapts
DECAY = 0.9  # what earlier rounds count for in the share that decides, per round


@dataclass(kw_only=True)
class Speculation:
    """A draft model, how many tokens it proposes at a time, and counts over all answers.

    Attributes:
        draft: the draft model; its vocabulary is the target's.
        num_draft_tokens: proposed in each round; None adapts it to what is accepted.
        rounds: passes of the target over proposals.
        drafted: tokens proposed.
        accepted: of these, how many the target took.
        seconds: that rounds took, but for the first, which compiles kernels.
        compares: whether `stream_generate` times plain steps too, behind an answer, to tell the speed-up.
        plain_step_seconds: what such a step takes, once it was timed.

    Raises:
        ConfigError: fewer than one token.
    """

    draft: Model
    num_draft_tokens: int | None = 5
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    compares: bool = False
    plain_step_seconds: float | None = None
    _timed_tokens: int = field(default=0, repr=False)
    _hits: float = field(default=2.0, repr=False)
    _tries: float = field(default=3.0, repr=False)

    def __post_init__(self) -> None:
        if self.num_draft_tokens is not None and self.num_draft_tokens < 1:
            raise SettingError("num_draft_tokens out of range", expected="at least 1", found=self.num_draft_tokens)

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the proposed tokens that were taken; None if there were none."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float | None:
        """Tokens that one pass of the target gave: those taken and one of its own. 1 is what it gives alone."""
        return 1 + self.accepted / self.rounds if self.rounds else None

    @property
    def speed_up(self) -> float | None:
        """Time of as many plain steps, as a multiple of the time of the rounds; None if not both were timed."""
        if self.plain_step_seconds is None or not self.seconds:
            return None
        return self.plain_step_seconds * self._timed_tokens / self.seconds

    def add_round(self, drafted: int, accepted: int, seconds: float = 0.0) -> None:
        """Counts a round."""
        if self.rounds:
            self.seconds, self._timed_tokens = self.seconds + seconds, self._timed_tokens + accepted + 1
        self.rounds, self.drafted, self.accepted = self.rounds + 1, self.drafted + drafted, self.accepted + accepted
        self._hits = DECAY * self._hits + accepted
        self._tries = DECAY * self._tries + min(accepted + 1, drafted)  # what follows a refused token was not judged

    def next_length(self, target: Model) -> int:
        """How many tokens to propose now.

        Adapting, it is the number with the most tokens per time if each is taken with the share that recent ones
        were, and a step of the draft takes as much of the target's as it has of its layers: so where starting
        kernels takes the time. Where reading weights does, a draft is cheaper, and somewhat more would do.
        """
        if self.num_draft_tokens is not None:
            return self.num_draft_tokens
        cost, share = len(self.draft.layers) / len(target.layers), self._hits / self._tries

        def gain(length: int) -> float:
            return sum(share**count for count in range(length + 1)) / (1 + cost * length)

        return max(range(1, MOST_DRAFT_TOKENS + 1), key=gain)

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
