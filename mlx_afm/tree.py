"""Comparing sets of named tensors: every difference found, all of them in one error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from mlx_afm.errors import TensorsError

Shape = tuple[int, ...]
SHOWN = 20  # differences spelled out; the rest is counted
# Prefixes that wrappers of torch modules put before every name, and how to save without them.
WRAPPERS = {
    "_orig_mod.": "torch.compile adds this prefix: save model._orig_mod.state_dict() instead.",
    "module.": "DataParallel and DistributedDataParallel add this prefix: save model.module.state_dict() instead.",
}


def require_same_tensors(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], *, where: object, advice: str | None = None
) -> None:
    """Checks that the names and shapes agree.

    Raises:
        TensorsError: lists what is missing, what is surplus and what has another shape; or, if one prefix explains all
            wrong names, names that prefix.
    """
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    if missing and surplus:
        _require_no_prefix(missing, surplus, where)
    misshaped = [
        f"wrong shape: {name}: expected {expected[name]}, found {found[name]}"
        for name in expected
        if name in found and tuple(expected[name]) != tuple(found[name])
    ]
    if missing or surplus or misshaped:
        lines = (
            [f"missing: {name}, shape {expected[name]}" for name in missing],
            [f"surplus: {name}, shape {found[name]}" for name in surplus],
            misshaped,
        )
        details = [line for kind in lines for line in shorten(kind, SHOWN // 2)]
        raise TensorsError("the tensors are not those of the model", where=where, advice=advice, details=details)


def require_unwrapped(names: Collection[str], *, where: object, start: str | None = None) -> None:
    """Checks that the names do not all have a prefix: of a wrapper of torch modules (`WRAPPERS`), or before `start`.

    Raises:
        TensorsError: they do.
    """
    first = next(iter(names), "")
    prefixes = [*WRAPPERS, first.partition(start)[0]] if start and start in first else [*WRAPPERS]
    for prefix in prefixes:
        if prefix and all(name.startswith(prefix) for name in names):
            raise _prefix_error(prefix, first.removeprefix(prefix), first, where)


def _require_no_prefix(missing: list[str], surplus: list[str], where: object) -> None:
    """Checks that the wrong names are not the right ones with one prefix too many or too few."""
    if pair := _prefixed(surplus, missing):
        prefix, name = pair
        raise _prefix_error(prefix, name, prefix + name, where)
    if pair := _prefixed(missing, surplus):
        prefix, name = pair
        what, advice = f"the tensor names lack the prefix {prefix!r}", "Add it to the names."
        raise TensorsError(what, where=where, expected=prefix + name, found=name, advice=advice)


def _prefixed(longer: list[str], shorter: list[str]) -> tuple[str, str] | None:
    """The prefix that all longer names have and most shorter ones lack, and one of these; None if there is none.

    Example: ["a.b.w", "a.c.w"] and ["b.w", "c.w"] -> ("a.", "b.w").
    """
    names = set(shorter)
    for candidate in longer[:SHOWN]:
        parts = candidate.split(".")
        for count in range(1, len(parts)):
            name = ".".join(parts[count:])
            prefix = candidate[: len(candidate) - len(name)]
            if name in names and all(other.startswith(prefix) for other in longer):
                matched = sum(other.removeprefix(prefix) in names for other in longer)
                if 2 * matched >= len(names):
                    return prefix, name
    return None


def _prefix_error(prefix: str, expected: str, found: str, where: object) -> TensorsError:
    what = f"the tensor names have the prefix {prefix!r}, which the model's names do not have"
    advice = WRAPPERS.get(prefix, "Save the tensors without it.")
    return TensorsError(what, where=where, expected=expected, found=found, advice=advice)


def shorten(lines: Iterable[str], shown: int = SHOWN) -> list[str]:
    """The first lines, and how many more there are."""
    lines = list(lines)
    return lines if len(lines) <= shown else [*lines[:shown], f"... and {len(lines) - shown} more"]
