"""Loss weights of the messages of a conversation, by the names that data formats have for them.

| key | value | from |
|---|---|---|
| `weight` | 0, 1 or any positive number | OpenAI's fine-tuning format, ShareGPT |
| `train` | true or false | ShareGPT |
| `label` | true or false, 1 or 0 | ShareGPT |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_afm.errors import DataError

WEIGHT_KEYS = ("weight", "train", "label")
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6  # float32 sums of weighted losses stay exact enough in between


def parse_weight(message: Mapping[str, Any], role: str, where: object) -> float | None:
    """The loss weight of a message; None where the role alone decides it.

    Args:
        message: its keys; those of `WEIGHT_KEYS` count.
        role: only an `assistant` message is trained, so that others may have weight 0 alone.
        where: named in errors.

    Raises:
        DataError: no such value, two keys that contradict each other, or a weight of a message that is not trained.
    """
    given = {key: _number(key, message[key], where) for key in WEIGHT_KEYS if key in message}
    if not given:
        return None
    if len({value > 0 for value in given.values()}) > 1:
        found = ", ".join(f"{key} {message[key]}" for key in given)
        advice = "Keep one of them"
        raise DataError("weights contradict each other", kind="wrong-weight", where=where, found=found, advice=advice)
    weight = given.get("weight", min(given.values()))
    if role != "assistant" and weight:
        raise DataError(
            f"a weight for role {role!r}",
            kind="wrong-weight",
            where=where,
            expected="weights of assistant messages: no other message is trained",
            found=f"{next(iter(given))} {message[next(iter(given))]}",
            advice="Remove it or make it 0",
        )
    return None if role != "assistant" or weight == 1 else weight


def _number(key: str, value: object, where: object) -> float:
    """The weight that a key gives: 0 or 1 for true and false."""
    if key != "weight" and value in (True, False):  # also 1 and 0
        return float(value)  # type: ignore[arg-type]
    if key == "weight" and type(value) in (int, float) and (value == 0 or MIN_WEIGHT <= value <= MAX_WEIGHT):  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    expected = "true or false"
    if key == "weight":
        expected = f"0, or a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:,.0f}"
    raise DataError(
        f"{key} cannot be used", kind="wrong-weight", where=where, expected=expected, found=f"{value!r:.40}"
    )
