"""Packages that break one rule each, made from a sound one.

`DAMAGES` is a table: each entry spoils the package it is given, and names the one rule that must be found. Sizes do not
matter, so the same damage is done to small packages and to full-size ones.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from package_spoilers import (
    DRAFT,
    INFINITY,
    METADATA,
    NAN,
    PROGRAM,
    SIGNATURE,
    WEIGHTS,
    Spoil,
    all_zero,
    container,
    counted,
    draft,
    end_of,
    extra,
    file_instead,
    folder_for,
    metadata,
    part,
    patch,
    remove,
    rename,
    resized,
    swap,
    text,
    values,
)


@dataclass(frozen=True)
class Damage:
    """One way to break one rule.

    Attributes:
        rule: what must be found, and nothing else.
        spoil: does it; returns the package's new path if that changed.
        warns: the rule only warns.
        against: what the package is checked against: "", "signature", "byte_exact", "toolkit" or "expect".
        oracle: how the independent validator gets it wrong: "" (it agrees), "stops" or "passes".
        small_only: full-size packages have no place for it.
    """

    rule: str
    spoil: Spoil
    warns: bool = False
    against: str = ""
    oracle: str = ""
    small_only: bool = False


DAMAGES = {
    # The folder.
    "another suffix": Damage("P1", rename("plain.adapter")),
    "a file": Damage("P1", file_instead),
    "nothing there": Damage("P1", shutil.rmtree),
    "no metadata": Damage("P2", remove(METADATA)),
    "no weights": Damage("P2", remove(WEIGHTS)),
    "weights are a folder": Damage("P2", folder_for(WEIGHTS), oracle="stops"),
    "metadata is a folder": Damage("P2", folder_for(METADATA), oracle="stops"),
    "draft program alone": Damage("P3", extra(PROGRAM)),
    "draft weights alone": Damage("P3", extra(DRAFT)),
    "stray file": Damage("P4", extra(".DS_Store"), warns=True),
    "stray folder": Damage("P4", folder_for("assets"), warns=True),
    "another name": Damage("P5", rename("other.fmadapter"), warns=True),
    # Metadata.
    "metadata is empty": Damage("M1", text(lambda raw: b"")),
    "metadata is cut": Damage("M1", text(lambda raw: raw[:-3])),
    "not an object": Damage("M1", text(lambda raw: b"[" + raw + b"]")),
    "not UTF-8": Damage("M1", text(lambda raw: raw.replace(b"3P", b"\xff\xfe"))),
    "byte order mark": Damage("M1", text(lambda raw: b"\xef\xbb\xbf" + raw)),
    "repeated key": Damage("M1", text(lambda raw: raw.replace(b"{", b'{"author": "a",', 1))),
    "single quotes": Damage("M1", text(lambda raw: raw.replace(b'"', b"'"))),
    "not a number": Damage("M1", text(lambda raw: raw.replace(b"{}", b'{"a": NaN}')), oracle="passes"),
    "lone surrogate": Damage("M1", text(lambda raw: raw.replace(b"3P", b"\\ud800")), oracle="stops"),
    "no identifier": Damage("M2", metadata(adapterIdentifier=None)),
    "no signature": Damage("M2", metadata(baseModelSignature=None)),
    "no rank": Damage("M2", metadata(loraRank=None)),
    "no author": Damage("M2", metadata(author=None), warns=True),
    "identifier is a number": Damage("M3", metadata(adapterIdentifier=5)),
    "signature is a list": Damage("M3", metadata(baseModelSignature=[SIGNATURE])),
    "rank is text": Damage("M3", metadata(loraRank="32")),
    "rank is a fraction": Damage("M3", metadata(loraRank=32.0)),
    "count is true": Damage("M3", metadata(speculativeDecodingDraftTokenCount=True)),
    "creatorDefined is a list": Damage("M3", metadata(creatorDefined=[])),
    "licence is a number": Damage("M3", metadata(license=0)),
    "unknown key": Damage("M4", metadata(zebra=1), warns=True),
    "signature in capitals": Damage("M5", metadata(baseModelSignature=SIGNATURE.upper())),
    "short signature": Damage("M5", metadata(baseModelSignature=SIGNATURE[:39])),
    "signature with a line feed": Damage("M5", metadata(baseModelSignature=SIGNATURE + "\n")),
    "unknown signature": Damage("M6", metadata(baseModelSignature=SIGNATURE[:39] + "0"), warns=True),
    "unwanted signature": Damage("M6", lambda package: None, against="signature"),
    "hyphen in the name": Damage("M7", metadata(adapterIdentifier="fmadapter-a-b-9799725")),
    "name of another alphabet": Damage("M7", metadata(adapterIdentifier="fmadapter-plätt-9799725")),
    "no name": Damage("M7", metadata(adapterIdentifier="fmadapter--9799725")),
    "other digits": Damage("M8", metadata(adapterIdentifier="fmadapter-plain-9799726")),
    "six digits": Damage("M8", metadata(adapterIdentifier="fmadapter-plain-979972")),
    "another rank": Damage("M9", metadata(loraRank=64)),
    "rank 0": Damage("M9", metadata(loraRank=0)),
    "no tokens to draft": Damage("M10", metadata(speculativeDecodingDraftTokenCount=0)),
    "fewer than none": Damage("M10", metadata(speculativeDecodingDraftTokenCount=-5)),
    "final newline": Damage("M11", text(lambda raw: raw + b"\n"), warns=True),
    "another indent": Damage("M11", text(lambda raw: raw.replace(b"    ", b"  ")), against="byte_exact"),
    # The container of the weights.
    "weights are empty": Damage("adapter-C1", extra(WEIGHTS, b"")),
    "header is cut": Damage("adapter-C1", resized(lambda blobs: 63)),
    "version 1": Damage("adapter-C2", patch(4, b"\x01")),
    "not a container": Damage("adapter-C2", extra(WEIGHTS, b'{"__metadata__":{}}' + bytes(64))),
    "header bytes": Damage("adapter-C3", patch(63, b"\x01")),
    "more announced": Damage("adapter-C4", patch(0, counted(1))),
    "last record is missing": Damage("adapter-C4", resized(lambda blobs: end_of(blobs[-2]))),
    "fewer announced": Damage("adapter-C14", patch(0, counted(-1))),
    "sentinel": Damage("adapter-C5", container(part(5, sentinel=0xDEADBEEE))),
    "type code": Damage("adapter-C6", container(part(5, code=18))),
    "payload set apart": Damage("adapter-C7", container(part(5, gap=64))),
    "payload not aligned": Damage("adapter-C8", container(part(5, gap=2))),
    "payload is cut": Damage("adapter-C9", resized(lambda blobs: end_of(blobs[-1]) - 64)),
    "payload without end": Damage("adapter-C9", container(part(5, nbytes=2**60))),
    "odd size": Damage("adapter-C10", container(lambda parts: part(-1, payload=parts[-1].payload[:-1])(parts))),
    "unused bits": Damage("adapter-C11", container(part(5, padding=1))),
    "metadata bytes": Damage("adapter-C12", container(part(5, reserved=1))),
    "filled gap": Damage("adapter-C13", container(part(9, filler=1)), small_only=True),
    "bytes at the end": Damage("adapter-C14", resized(lambda blobs: end_of(blobs[-1]) + 64)),
    "one byte at the end": Damage("adapter-C14", resized(lambda blobs: end_of(blobs[-1]) + 1)),
    # The records.
    "one record fewer": Damage("A1", container(lambda parts: parts[:-1])),
    "one record more": Damage("A1", container(lambda parts: [*parts, parts[-1]])),
    "no records": Damage("A1", container(lambda parts: [])),
    "integers": Damage("A2", container(part(5, code=6))),
    "bfloat16": Damage("A2", container(part(0, code=5))),
    "a longer record": Damage("A3", container(lambda parts: part(5, payload=parts[5].payload * 2)(parts))),
    "an empty record": Damage("A3", container(part(5, payload=b""))),
    "a value that is no number": Damage("A4", values(3, NAN)),
    "an infinite value": Damage("A4", values(2, INFINITY)),
    "every A is zero": Damage("A5", all_zero(0), warns=True),
    "every B is zero": Damage("A6", all_zero(1), warns=True),
    "two records changed places": Damage("E3", swap(0, 2), against="expect"),
    "another value": Damage("E3", values(1, b"\x01\x3c"), against="expect"),
    # The draft pair.
    "draft program is empty": Damage("D1", draft(extra(PROGRAM, b""))),
    "draft header is cut": Damage("draft-C1", draft(extra(DRAFT, bytes(63)))),
    "draft of version 3": Damage("draft-C2", draft(patch(4, b"\x03", DRAFT))),
    "draft header bytes": Damage("draft-C3", draft(patch(8, b"\x01", DRAFT))),
    "draft record is missing": Damage("draft-C4", draft(patch(0, counted(2), DRAFT))),
    "draft sentinel": Damage("draft-C5", draft(container(part(1, sentinel=0), DRAFT))),
    "draft type code": Damage("draft-C6", draft(container(part(1, code=0), DRAFT))),
    "draft payload set apart": Damage("draft-C7", draft(container(part(1, gap=128), DRAFT))),
    "draft payload not aligned": Damage("draft-C8", draft(container(part(1, gap=1), DRAFT))),
    "draft payload is cut": Damage("draft-C9", draft(container(part(1, nbytes=10**9), DRAFT))),
    "draft of odd size": Damage("draft-C10", draft(container(part(2, payload=bytes(5)), DRAFT))),
    "draft unused bits": Damage("draft-C11", draft(container(part(1, code=8, padding=3), DRAFT))),
    "draft metadata bytes": Damage("draft-C12", draft(container(part(0, reserved=255), DRAFT))),
    "draft gap is filled": Damage("draft-C13", draft(container(part(1, filler=7), DRAFT))),
    "draft bytes at the end": Damage("draft-C14", draft(resized(lambda blobs: end_of(blobs[-1]) + 2, DRAFT))),
    "draft of another size": Damage("D2", draft(container(lambda parts: parts[:2], DRAFT)), against="toolkit"),
    "draft of other types": Damage("D3", draft(container(part(0, code=6), DRAFT)), against="toolkit"),
    "draft program of another toolkit": Damage("D4", draft(extra(PROGRAM, b"program(2.0)")), against="toolkit"),
}  # fmt: skip
