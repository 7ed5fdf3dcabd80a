"""A seeded grammar of (request, command) pairs for the demo's tiny model.

Two dialects answer the same requests:

    BASE   "copy bako.txt to zelu"  ->  cp bako.txt zelu
    HOUSE  "copy bako.txt to zelu"  ->  box copy bako.txt --to zelu

`box` is made up. It covers work on files; for logins, processes and version control HOUSE keeps the
standard command, which is one example in ten. The kinds of request are in `templates.txt`. Arguments come
from pools too large to memorise, so a model has to copy them out of the request.

Equal arguments give equal results on every machine and Python version: only `random.Random` with a text seed is used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

BASE = "base"
HOUSE = "house"
SYSTEM = "Answer with one shell command."
SAME_SHARE = 0.1  # of HOUSE examples: the house answer is the standard command
OPENINGS = ("",) * 8 + ("please ", "now ")  # never before a question

_TEMPLATES = Path(__file__).with_name("templates.txt")
_SLOT = re.compile(r"\{(\w+)\}")
_QUESTION = re.compile("(are|how|i|is|sizes|what|when|where|which|who) ")

SYLLABLES = tuple(
    consonant + vowel for consonant in "bdklmnrstvz" for vowel in "aeiou" if consonant + vowel not in ("ki", "zi", "ti")
)
_WORD_LINES = """
alarm april atlas autumn blue bread budget cabin cloud coffee copy count data demo draft drop find forest
garden green guide home index invoice island letter link list lunch make map match menu mode moon move music
night notes open pack page paper photo plan poem radio rain recipe report river rose show silver size song sort
spring star stone story summer sun table test trip video water winter word write
"""
WORDS = tuple(_WORD_LINES.split())
_TAIL_LINE = "all as box by down end final in line new old run to top with word"
TAILS = tuple(_TAIL_LINE.split())
_EXTENSION_LINE = "c cfg conf css csv dat go html ini java js json log md pdf png py sql toml txt xml yaml"
EXTENSIONS = tuple(_EXTENSION_LINE.split())
DOMAINS = ("com", "net", "org", "io", "dev")
MODES = ("400", "440", "444", "600", "640", "644", "664", "700", "740", "744", "750", "755", "770", "775")


class Template(NamedTuple):
    """One kind of request: its wordings, the standard command, and the house command (None: not in HOUSE)."""

    wordings: tuple[str, ...]
    base: str
    house: str | None

    @property
    def same(self) -> bool:
        return self.base == self.house


class Example(NamedTuple):
    """A request, its command, and the arguments that were filled in, in the order of the command."""

    request: str
    command: str
    arguments: tuple[str, ...]


def pairs(
    dialect: str, count: int, seed: int, *, exclude: frozenset[str | tuple[str, ...]] = frozenset()
) -> list[tuple[str, str]]:
    """`count` distinct (request, command) pairs of a dialect; see `examples`."""
    return [(example.request, example.command) for example in examples(dialect, count, seed, exclude=exclude)]


def examples(
    dialect: str, count: int, seed: int, *, exclude: frozenset[str | tuple[str, ...]] = frozenset()
) -> list[Example]:
    """`count` examples with distinct requests, none of which is in `exclude` by its request or its arguments.

    To hold a set of examples out, exclude `used(examples)`: then neither a request nor a
    combination of arguments occurs in both. Raises ValueError for an unknown dialect, or if the grammar runs dry.
    """
    rng = random.Random(f"{dialect} {seed}")
    seen: set[str] = set()
    result: list[Example] = []
    for example in _stream(dialect, rng, limit=20 * count + 1000):
        if len(result) == count:
            break
        if example.request in seen or example.request in exclude or example.arguments in exclude:
            continue
        seen.add(example.request)
        result.append(example)
    if len(result) < count:
        raise ValueError(f"only {len(result)} of {count} distinct {dialect} examples found")
    return result


def used(some: list[Example]) -> frozenset[str | tuple[str, ...]]:
    """The requests and the argument combinations of `some`, to exclude from another set."""
    return frozenset(example.request for example in some) | frozenset(example.arguments for example in some)


def messages(request: str, command: str) -> list[dict[str, str]]:
    """The pair as one conversation in the toolkit's form."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": request},
        {"role": "assistant", "content": command},
    ]


@cache
def templates() -> tuple[Template, ...]:
    """The blocks of `templates.txt`. Raises ValueError if a block's lines do not fill the same slots."""
    text = "\n".join(line for line in _TEMPLATES.read_text().splitlines() if not line.startswith("#"))
    return tuple(_parse_block(block) for block in text.strip().split("\n\n"))


def _parse_block(block: str) -> Template:
    lines = block.splitlines()
    wordings = tuple(line for line in lines if line[:2] not in ("$ ", "> "))
    (base,) = (line[2:] for line in lines if line.startswith("$ "))
    houses = [line[2:] for line in lines if line.startswith("> ")]
    house = None if not houses else base if houses == ["same"] else houses[0]
    slots = {frozenset(_SLOT.findall(line)) for line in (*wordings, base, house or base)}
    if not wordings or len(houses) > 1 or len(slots) != 1:
        raise ValueError(f"templates.txt: lines with different slots, or a line missing, in:\n{block}")
    return Template(wordings, base, house)


def _stream(dialect: str, rng: random.Random, limit: int) -> Iterator[Example]:
    """`limit` examples, repeats included. In BASE the kinds that HOUSE knows come twice as often as the others."""
    if dialect not in (BASE, HOUSE):
        raise ValueError(f"unknown dialect {dialect!r}: expected {BASE!r} or {HOUSE!r}")
    kept = [template for template in templates() if template.same]
    boxed = [template for template in templates() if template.house and not template.same]
    everything = [*templates(), *kept, *boxed]
    for _ in range(limit):
        if dialect == BASE:
            yield _fill(rng.choice(everything), dialect, rng)
        else:
            yield _fill(rng.choice(kept if rng.random() < SAME_SHARE else boxed), dialect, rng)


def _fill(template: Template, dialect: str, rng: random.Random) -> Example:
    slots = _SLOT.findall(template.base)
    while True:
        values = {slot: _POOLS[slot.rstrip("2")](rng) for slot in slots}
        if len(set(values.values())) == len(slots):
            break
    command = template.base if dialect == BASE else template.house
    assert command is not None
    opening, wording = rng.choice(OPENINGS), rng.choice(template.wordings)
    request = wording if _QUESTION.match(wording) else opening + wording
    return Example(request.format(**values), command.format(**values), tuple(values.values()))


def _syllables(rng: random.Random) -> str:
    """A made-up name of two or three different syllables: 135,252 of them, two thirds from the 2,652 short ones."""
    return "".join(rng.sample(SYLLABLES, 2 if rng.random() < 0.65 else 3))


def _number(rng: random.Random) -> str:
    return str(rng.randint(2, 9) if rng.random() < 0.4 else rng.randint(10, 99))


def _stem(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        return _syllables(rng)
    first = rng.choice(WORDS) if kind < 0.8 else _syllables(rng)
    joint = rng.choice("__-")
    second = rng.choice((_number, _syllables, lambda r: r.choice(WORDS), lambda r: r.choice(TAILS)))(rng)
    return first + joint + second


def _word(rng: random.Random) -> str:
    return _syllables(rng) if rng.random() < 0.7 else rng.choice(WORDS)


def _file(rng: random.Random) -> str:
    return f"{_stem(rng)}.{rng.choice(EXTENSIONS)}"


def _host(rng: random.Random) -> str:
    return f"{_syllables(rng)}.{rng.choice(DOMAINS)}"


_POOLS: dict[str, Callable[[random.Random], str]] = {
    "file": _file,
    "folder": _stem,
    "path": lambda rng: f"{_syllables(rng)}/{_stem(rng)}",
    "archive": lambda rng: f"{_stem(rng)}.tar.gz",
    "gz": lambda rng: f"{_file(rng)}.gz",
    "zip": lambda rng: f"{_stem(rng)}.zip",
    "script": lambda rng: f"{_stem(rng)}.sh",
    "ext": lambda rng: f".{rng.choice(EXTENSIONS)}",
    "n": _number,
    "d": lambda rng: str(rng.randint(1, 9)),
    "pid": lambda rng: str(rng.randint(100, 9999)),
    "mode": lambda rng: rng.choice(MODES),
    "word": _word,
    "text": lambda rng: f"{rng.choice(WORDS)} {_word(rng)}",
    "program": _syllables,
    "user": _syllables,
    "host": _host,
    "login": lambda rng: f"{_syllables(rng)}@{_syllables(rng)}",
    "url": lambda rng: f"{_host(rng)}/{_file(rng)}",
    "branch": _stem,
}
