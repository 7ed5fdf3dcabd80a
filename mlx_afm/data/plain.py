"""Plain lines to rendered text, a block at once and without parsing: nearly all lines of nearly all data are such.

A plain line is, byte for byte, what `json.dumps` writes of a list of messages, or of `{"messages": [...]}`, with
nothing but roles and texts: `[system,] user, assistant, ... assistant`. Such a line is a chain of a few fixed pieces
of JSON with texts in between, so replacing the pieces renders it:

    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]
    <turn_start> user<n>          hi   <turn_end><turn_start> assistant<n> ok <turn_end>

Why this is sound: escapes are replaced first, so that a quote or backslash that is left stands for itself. Each
fixed piece leaves a control byte behind, which JSON may hold nowhere. What is left of a line without its texts, its
skeleton, is then these bytes and whatever else no text may hold; a skeleton that is a good conversation's proves
that the line is the chain above. Any other line is no plain one: it is read, and if need be refused, by `records`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from mlx_afm.data.config import DataConfig
from mlx_afm.data.oddities import OTHER_TEMPLATES
from mlx_afm.data.rows import DataRow
from mlx_afm.text.template import NEWLINE, TURN_END, TURN_START
from mlx_afm.text.words import SHARED

# Stand-ins within texts, and what the pieces of JSON leave behind.
_BACKSLASH, _QUOTE, _LINE = b"\x01", b"\x02", b"\x03"
_USER, _ASSISTANT, _FROM_SYSTEM, _FROM_USER, _END, _ODD = b"\x04", b"\x05", b"\x06", b"\x0e", b"\x0f", b"\x11"
_TAKEN = (_BACKSLASH, _QUOTE, _LINE, _USER, _ASSISTANT, _FROM_SYSTEM, _FROM_USER, _END, _ODD, SHARED.encode())
_TEXT_BYTES = bytes({*range(256)} - {*range(0x20), *b'"\\'} | {*_BACKSLASH + _QUOTE + _LINE + SHARED.encode()})
_LEFT_BEHIND = _USER + _ASSISTANT + _FROM_SYSTEM + _FROM_USER + _END
_BETWEEN = "\x0b"  # rendered lines, while they are one text
_RESTORED = bytes.maketrans(b"\n" + _BACKSLASH + _QUOTE + _LINE, _BETWEEN.encode() + b'\\"\n')
_GOOD = re.compile(rb"(?:\x06(?:\x04\x05)+|\x0e\x05(?:\x04\x05)*)\x0f")
_ROLES = {0x04: ("user",), 0x05: ("assistant",), 0x06: ("system",), 0x0E: ("system", "user"), 0x0F: ()}
_HEADS = {role: f"{TURN_START} {role}{NEWLINE}" for role in ("system", "user", "assistant")}
_BLANK = re.compile(rf"{NEWLINE}\s*{TURN_END}")


class _Style(NamedTuple):
    """How `json.dumps` was asked to write: the first line of a block tells, and the others are held to it."""

    data_format: str
    opening: str
    closing: str
    key: str  # between a key and its value
    item: str  # between two of them

    def head(self, role: str) -> str:
        return f'{{"role"{self.key}"{role}"{self.item}"content"{self.key}"'

    def next(self, role: str) -> str:
        return f'"}}{self.item}{self.head(role)}'

    @property
    def end(self) -> str:
        return f'"}}{self.closing}\n'


_STYLES = [
    _Style(data_format, opening, closing, key, item)
    for key, item in ((": ", ", "), (":", ","))
    for data_format, opening, closing in (("toolkit", "[", "]"), ("messages", f'{{"messages"{key}[', "]}"))
]


@dataclass(frozen=True)
class PlainLines:
    """The plain lines of a block.

    Attributes:
        texts: the rendered conversation of each row; of a row that is not plain, nothing of use.
        roles: those of its turns; None for a row that is not plain.
        shared: what `SHARED`, with which a text may begin, stands for.
    """

    texts: list[str]
    roles: list[tuple[str, ...] | None]
    shared: str


class PlainReader:
    """Tells plain lines, and renders them as `RecordReader` and `render_example` would."""

    def __init__(self, config: DataConfig, special_pieces: Sequence[str]) -> None:
        """Takes what decides how a conversation is rendered.

        Args:
            config: how to read.
            special_pieces: texts that no message may contain, from the tokenizer.
        """
        system = config.system or ""
        possible = config.transform is None and not re.search(r"[\x00-\x09\x0b-\x1f]", system)
        data_formats = {"toolkit"} if config.fields else {"toolkit", "messages"}  # a list has no fields
        data_formats &= {"toolkit", "messages"} if config.data_format == "auto" else {config.data_format}
        self._styles = [style for style in _STYLES if possible and style.data_format in data_formats]
        self._has_system = config.system is not None
        self._system = f"{_HEADS['system']}{system}{TURN_END}" if self._has_system else ""
        # The newline's piece and other models' special tokens too: a text may spell them, but data check says so.
        looked_at = (NEWLINE, *special_pieces, *OTHER_TEMPLATES)
        self._special = re.compile(b"|".join(re.escape(_standing_in(piece)) for piece in looked_at))

    def __call__(self, rows: Sequence[DataRow]) -> PlainLines | None:
        """The plain lines among the rows; None if there are none, or something asks for a closer look at all."""
        texts = [row.text for row in rows]
        style = self._style(texts[0]) if texts else None
        block = b"\n".join([b"", *texts, b""])
        if style is None or block.count(b"\n") != len(rows) + 1 or any(byte in block for byte in _TAKEN):
            return None
        block = self._unescaped(block)
        first = _first(block, style)
        return self._read(block, style, first, self._shared(first, style))

    def _style(self, line: bytes) -> _Style | None:
        starts = [(style, role) for style in self._styles for role in ("system", "user")]
        return next((s for s, role in starts if line.startswith((s.opening + s.head(role)).encode())), None)

    def _unescaped(self, block: bytes) -> bytes:
        """The block with its most common escapes replaced, and a byte in the lines that need a closer look."""
        if b"\\" in block:
            block = _ESCAPE.sub(lambda escape: _ESCAPES[escape.group()], block)
        if not block.isascii():
            block = block.replace("\ufffd".encode(), _ODD)
        return self._special.sub(_ODD, block)

    def _shared(self, first: bytes, style: _Style) -> str:
        """What the system turn and the head of the user's turn, as the block begins, are rendered to."""
        line = first + f"x{style.next('assistant')}x{style.end}".encode()
        read = self._read(line, style, b"", "")
        if read is None or read.roles != [("system", "user", "assistant")]:
            return ""
        rest = f" user{NEWLINE}x{TURN_END}{_HEADS['assistant']}x{TURN_END}"
        return read.texts[0].removesuffix(rest) if read.texts[0].endswith(rest) else ""

    def _read(self, block: bytes, style: _Style, first: bytes, shared: str) -> PlainLines | None:
        block = self._rendered(block, style, first if shared else b"")
        skeletons = block.translate(None, _TEXT_BYTES).split(b"\n")[1:-1]
        try:
            text = block.translate(_RESTORED, _LEFT_BEHIND).decode("utf-8")
        except UnicodeDecodeError:
            return None
        roles = [_roles(skeleton, self._has_system) for skeleton in skeletons]
        return None if _BLANK.search(text) else PlainLines(text.split(_BETWEEN)[1:-1], roles, shared)

    def _rendered(self, block: bytes, style: _Style, first: bytes) -> bytes:
        """The block with its JSON replaced; each replacement leaves its byte behind, the line ends stay."""
        end = TURN_END.encode() + _END + b"\n"
        if first:
            start = _FROM_SYSTEM + _USER + f"{SHARED} user{NEWLINE}".encode()
            block = b"\n" + start + block[len(first) :].replace(style.end.encode() + first[1:], end + start)
        block = block.replace(style.end.encode(), end)
        pieces = [
            (style.next("assistant"), _ASSISTANT, TURN_END + _HEADS["assistant"]),
            (style.next("user"), _USER, TURN_END + _HEADS["user"]),
            (f"\n{style.opening}{style.head('system')}", b"\n" + _FROM_SYSTEM, _HEADS["system"]),
            (f"\n{style.opening}{style.head('user')}", b"\n" + _FROM_USER, self._system + _HEADS["user"]),
        ]
        for piece, left, rendered in pieces:
            if b'"' not in block:
                break
            block = block.replace(piece.encode(), left + _standing_in(rendered))
        return block


def _first(block: bytes, style: _Style) -> bytes:
    """What a block begins with, up to the text of its first user."""
    start = f"\n{style.opening}{style.head('user')}".encode()
    if block.startswith(start):
        return start
    head = style.next("user").encode()
    place = block.find(head)
    return b"" if place < 0 else block[: place + len(head)]


_ESCAPES = {b"\\\\": _BACKSLASH, b'\\"': _QUOTE, b"\\n": _LINE}
_ESCAPE = re.compile(rb'\\[\\"n]')  # other escapes are left, and make their line no plain one


def _standing_in(text: str) -> bytes:
    """A text as it stands in a block whose escapes are replaced."""
    replaced = text.encode("utf-8", "surrogatepass").replace(b"\\", _BACKSLASH).replace(b'"', _QUOTE)
    return replaced.replace(b"\n", _LINE)


@lru_cache(maxsize=4096)
def _roles(skeleton: bytes, default_system: bool) -> tuple[str, ...] | None:
    """The roles of a plain line's turns, from what its texts leave; None if it is no plain line."""
    if len(skeleton) > 256 or not _GOOD.fullmatch(skeleton):
        return None
    roles = tuple(role for left in skeleton for role in _ROLES[left])
    return roles[1:] if skeleton.startswith(_FROM_USER) and not default_system else roles
