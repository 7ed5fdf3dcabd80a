"""What a SentencePiece `tokenizer.model` says about itself, read without protobuf.

The `sentencepiece` library encodes and decodes, but does not tell which pieces are user-defined,
nor how text is normalised; both are needed here, and the fields are few.

Byte layout: one protobuf message, a sequence of fields. A field is a varint `number * 8 + kind`
followed by a varint (kind 0), 8 bytes (1), a varint length and that many bytes (2), or 4 bytes (5).

    1  piece, repeated:   1 text, 2 score (float32), 3 kind of piece (varint, 1 if absent)
    2  trainer settings:  3 model type (1 unigram, 2 BPE), 24 space as suffix, 35 byte fallback
    3  normaliser:        2 character map, 3 dummy prefix, 4 remove extra spaces, 5 escape spaces
                          (the last three are true if absent)

Limits: every length is checked against what is left of the file; a varint has at most 10 bytes.
Other fields are skipped, as protobuf demands.
Source: sentencepiece_model.proto; checked against the library's own generated reader in the tests.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from mlx_afm.errors import FormatError

SPACE = "\u2581"  # how pieces spell a space


class PieceKind(IntEnum):
    """What a piece is for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its position."""

    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """The vocabulary and the settings that decide how text becomes pieces."""

    pieces: tuple[Piece, ...]
    model_type: int = 1
    byte_fallback: bool = False
    space_as_suffix: bool = False
    character_map: bytes = b""
    dummy_prefix: bool = True
    remove_extra_spaces: bool = True
    escape_spaces: bool = True

    def texts(self, *kinds: PieceKind) -> tuple[str, ...]:
        """The pieces of these kinds, in the order of their ids."""
        return tuple(piece.text for piece in self.pieces if piece.kind in kinds)


def parse_sentencepiece_model(data: bytes, *, where: object) -> SentencePieceModel:
    """The model in the bytes of a `tokenizer.model`.

    Raises:
        FormatError: the bytes are no SentencePiece model.
    """
    pieces: list[Piece] = []
    settings: dict[str, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number in _SETTINGS and isinstance(value, bytes):
                names = _SETTINGS[number]
                settings.update({names[n]: v for n, v in _fields(value) if n in names})
        if not pieces:
            raise ValueError("it has no pieces")
        return _model(pieces, settings)
    except (ValueError, TypeError, struct.error) as error:
        raise FormatError(
            f"not a SentencePiece model: {error}", where=where, advice="Copy the original tokenizer.model again"
        ) from error


_SETTINGS = {
    2: {3: "model_type", 24: "space_as_suffix", 35: "byte_fallback"},
    3: {2: "character_map", 3: "dummy_prefix", 4: "remove_extra_spaces", 5: "escape_spaces"},
}


def _model(pieces: list[Piece], settings: dict[str, int | bytes]) -> SentencePieceModel:
    known: dict[str, int | bytes | bool] = {}
    for name, value in settings.items():
        if isinstance(value, bytes) != (name == "character_map"):
            raise ValueError(f"setting {name} has the wrong type")
        known[name] = value if name in ("character_map", "model_type") else bool(value)
    return SentencePieceModel(pieces=tuple(pieces), **known)  # type: ignore[arg-type]


def _piece(data: bytes) -> Piece:
    size = len(data)
    if size > 7 and data[0] == 0x0A and data[1] == size - 7 < 0x80 and data[-5] == 0x15:  # most: a text and its score
        return Piece(data[2:-5].decode("utf-8"), struct.unpack_from("<f", data, size - 4)[0], PieceKind.NORMAL)
    text, score, kind = b"", 0.0, 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text.decode("utf-8"), score, PieceKind(kind))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field; varints as int, everything else as bytes."""
    offset, end = 0, len(data)
    while offset < end:
        tag, offset = _varint(data, offset)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, offset = _varint(data, offset)
            yield number, value
            continue
        if kind == 2:
            size, offset = _varint(data, offset)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"field of unknown kind {kind} at byte {offset}")
        if number == 0 or size > end - offset:
            raise ValueError(f"field at byte {offset} does not fit")
        yield number, data[offset : offset + size]
        offset += size


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if offset >= len(data):
            raise ValueError("it ends within a number")
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise ValueError(f"a number is too long at byte {offset}")
