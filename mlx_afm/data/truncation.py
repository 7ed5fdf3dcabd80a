"""What becomes of an example that is longer than allowed."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_afm.errors import DataError
from mlx_afm.text.template import Encoded

CUTTABLE = ("user", "tool")  # the system message and the answers stay whole


@dataclass(frozen=True)
class Fitted:
    """An example that fits, or None where it was left out.

    Attributes:
        encoded: what is left of it.
        removed_tokens: how many tokens it lost.
    """

    encoded: Encoded | None
    removed_tokens: int = 0


def fit(encoded: Encoded, max_tokens: int, truncation: str) -> Fitted:
    """The example, at most `max_tokens` long.

    Args:
        encoded: an example.
        max_tokens: longest allowed.
        truncation: see `DataConfig`.

    Raises:
        DataError: it is too long, and `truncation` says that this is an error, or cannot help.
    """
    excess = len(encoded.ids) - max_tokens
    if excess <= 0:
        return Fitted(encoded)
    if truncation == "drop":
        return Fitted(None, len(encoded.ids))
    if truncation == "truncate-answer":
        kept = Encoded(encoded.ids[:max_tokens], encoded.weights[:max_tokens])
        return Fitted(kept, excess) if any(kept.trained) else Fitted(None, len(encoded.ids))
    if truncation == "truncate-prompt":
        kept = _without_middles(encoded, excess)
        if len(kept.ids) <= max_tokens:
            return Fitted(kept, excess)
    raise _too_long(encoded, max_tokens, truncation)


def _without_middles(encoded: Encoded, excess: int) -> Encoded:
    """Tokens taken out of the longest cuttable texts, from the middle: the request stands at either end."""
    cuts: list[tuple[int, int]] = []
    for turn in sorted(encoded.turns, key=lambda turn: turn.body - turn.stop):
        length = turn.stop - 1 - turn.body  # without its <turn_end>
        if turn.role in CUTTABLE and excess > 0 and length > 2:
            removed = min(excess, length - 2)
            first = turn.body + (length - removed) // 2
            cuts.append((first, first + removed))
            excess -= removed
    ids, weights = list(encoded.ids), list(encoded.weights)
    for first, last in sorted(cuts, reverse=True):
        del ids[first:last], weights[first:last]
    return Encoded(ids, weights)


def _too_long(encoded: Encoded, max_tokens: int, truncation: str) -> DataError:
    answer, lost = sum(encoded.trained), sum(encoded.trained[max_tokens:])
    advice = (
        f"Cutting its end off would lose {lost:,} of {answer:,} trained tokens. "
        "Shorten it, choose --truncation, or raise --max-seq-length (the context is 4096)"
    )
    if truncation == "truncate-prompt":
        advice = f"The system message and answers alone are too long ({answer:,} trained tokens)"
    return DataError(
        "too long",
        kind="too-long",
        expected=f"at most {max_tokens:,} tokens",
        found=f"{len(encoded.ids):,} tokens",
        advice=advice,
    )
