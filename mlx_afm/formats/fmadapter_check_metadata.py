"""Rules of a package's `metadata.json`: M1 to M11, P5, G1 and G2; see `fmadapter_check`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.formats.fmadapter import METADATA_FILE
from mlx_afm.formats.fmadapter_metadata import (
    IDENTIFIER_FORM,
    PUBLIC_SIGNATURE,
    SIGNATURE_FORM,
    SUFFIX,
    canonical_text,
    parse_metadata,
    read_metadata_bytes,
    stated_geometry,
)
from mlx_afm.formats.fmadapter_plan import APPLE_GEOMETRY, Geometry
from mlx_afm.formats.fmadapter_report import Findings, shown

_REQUIRED_KEYS: dict[str, type] = {"adapterIdentifier": str, "baseModelSignature": str, "loraRank": int}
_KEYS: dict[str, type] = {
    **_REQUIRED_KEYS,
    "author": str,
    "creatorDefined": dict,
    "description": str,
    "license": str,
    "speculativeDecodingDraftTokenCount": int,
}
_JSON_NAMES = {str: "text", int: "an integer", dict: "an object"}


def check_metadata(folder: Path, signature: str | None, byte_exact: bool, found: Findings) -> Geometry:
    """Checks the metadata; the geometry to plan the weights with."""
    fail, warn = partial(found.fail, file=METADATA_FILE), partial(found.warn, file=METADATA_FILE)
    try:
        raw = read_metadata_bytes(folder / METADATA_FILE)
        content = parse_metadata(raw)
    except FormatError as error:
        fail("M1", error.what)
        return APPLE_GEOMETRY
    _check_keys(content, found)
    _check_identity(content, folder.name.removesuffix(SUFFIX), signature, found)
    geometry = APPLE_GEOMETRY
    try:
        geometry = stated_geometry(content) or APPLE_GEOMETRY
    except ConfigError as error:
        fail("G2", f"creatorDefined states a geometry that cannot be: {shown(' '.join(str(error).split()))}")
    if replace(geometry, rank=APPLE_GEOMETRY.rank) != APPLE_GEOMETRY:
        warn("G1", "no device would take this package: it is not made for Apple's model but for one of other sizes")
    elif geometry != APPLE_GEOMETRY:
        warn("G1", f"no device is known to take LoRA rank {geometry.rank}: Apple's model is served with rank 32")
    rank, tokens = content.get("loraRank"), content.get("speculativeDecodingDraftTokenCount")
    if _is(rank, int) and rank != geometry.rank:
        fail("M9", f"loraRank {shown(rank)}, expected {geometry.rank}")
    if isinstance(tokens, int) and tokens < 1:
        fail("M10", f"speculativeDecodingDraftTokenCount {shown(tokens)} is not positive")
    if raw != canonical_text(content).encode("utf-8"):
        (fail if byte_exact else warn)("M11", "not the canonical text (sorted keys, 4-space indent, no final newline)")
    return geometry


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_keys(content: dict[str, Any], found: Findings) -> None:
    """M2, M3, M4."""
    for key, kind in _KEYS.items():
        if key not in content:
            add = found.fail if key in _REQUIRED_KEYS else found.warn
            add("M2", f"key {key} is missing", METADATA_FILE)
        elif not _is(content[key], kind):
            found.fail("M3", f"{key} must be {_JSON_NAMES[kind]}, not {shown(content[key])}", METADATA_FILE)
    for key in sorted(set(content) - set(_KEYS)):
        found.warn("M4", f"key {shown(key)} is not one that packages have", METADATA_FILE)


def _check_identity(content: dict[str, Any], folder_name: str, wanted: str | None, found: Findings) -> None:
    """M5 to M8, and P5."""
    fail, warn = partial(found.fail, file=METADATA_FILE), partial(found.warn, file=METADATA_FILE)
    signature, identifier = content.get("baseModelSignature"), content.get("adapterIdentifier")
    if isinstance(signature, str):
        if not SIGNATURE_FORM.fullmatch(signature):
            fail("M5", f"baseModelSignature {shown(signature)} is not 40 lower-case hex digits")
        elif wanted is not None and not signature.startswith(wanted):
            fail("M6", f"baseModelSignature {signature}, wanted {shown(wanted)}")
        elif wanted is None and signature != PUBLIC_SIGNATURE:
            warn("M6", f"baseModelSignature {signature} belongs to no public toolkit: ask the device")
    if isinstance(identifier, str):
        parts = IDENTIFIER_FORM.fullmatch(identifier)
        if parts is None:
            fail("M7", f"adapterIdentifier {shown(identifier)} is not fmadapter-<letters, digits, _>-<digits>")
            return
        if isinstance(signature, str) and parts[2] != signature[:7]:
            fail("M8", f"adapterIdentifier ends in {shown(parts[2])}, the signature begins {shown(signature[:7])}")
        if parts[1] != folder_name:
            warn("P5", f"the folder's name differs from the adapter's, {shown(parts[1])}")
