"""Comparing sets of named tensors: every difference found, all of them in one error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mlx_afm.errors import TensorsError

Shape = tuple[int, ...]
SHOWN = 20  # differences spelled out; the rest is counted


def require_same_tensors(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], *, where: object, advice: str | None = None
) -> None:
    """Checks that the names and shapes agree.

    Raises:
        TensorsError: lists what is missing, what is surplus and what has another shape.
    """
    missing = [f"missing: {name}, shape {expected[name]}" for name in expected if name not in found]
    surplus = [f"surplus: {name}, shape {found[name]}" for name in found if name not in expected]
    misshaped = [
        f"wrong shape: {name}: expected {expected[name]}, found {found[name]}"
        for name in expected
        if name in found and tuple(expected[name]) != tuple(found[name])
    ]
    if missing or surplus or misshaped:
        details = [line for kind in (missing, surplus, misshaped) for line in shorten(kind, SHOWN // 2)]
        raise TensorsError("the tensors are not those of the model", where=where, advice=advice, details=details)


def shorten(lines: Iterable[str], shown: int = SHOWN) -> list[str]:
    """The first lines, and how many more there are."""
    lines = list(lines)
    return lines if len(lines) <= shown else [*lines[:shown], f"... and {len(lines) - shown} more"]
