"""Whether an unknown name is a misspelling of a known one. Only then may a message say "is it ...?"."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

LEAST_RATIO = 0.8  # of whole names
LEAST_WORD_RATIO = 0.6  # of each word; one letter of three may differ


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` misspells, or None.

    Two names are one only if they agree apart from a few letters and have equally many words: `test_batches` is not
    `val_batches`, and `mask_prompt` is not `sample_prompt`.

    Example: `batchsize` gives `batch_size`, `itres` gives `iters`, `lora_layers` gives None.
    """
    plain = _plain(name)
    rated = [(SequenceMatcher(None, plain, _plain(other)).ratio(), other) for other in known]
    near = [(ratio, other) for ratio, other in rated if ratio >= LEAST_RATIO and _same_words(name, other)]
    return max(near)[1] if near else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _same_words(name: str, other: str) -> bool:
    """Whether each word of one is near the word of the other; names without underscores have one long word."""
    words, others = name.lower().replace("-", "_").split("_"), other.lower().replace("-", "_").split("_")
    if len(words) != len(others):
        return len(words) == 1 or len(others) == 1
    return all(SequenceMatcher(None, one, two).ratio() >= LEAST_WORD_RATIO for one, two in zip(words, others))
