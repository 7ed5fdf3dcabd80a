"""Whether an adapter package is one that a device would take, as a list of findings.

Rules, by what they look at; (w) marks those that only warn:

    P1 folder and suffix  P2 required files  P3 draft files in pairs  P4 other files (w)  P5 folder name (w)
    M1 JSON object  M2 keys (w for the optional ones)  M3 types  M4 unknown keys (w)  M5 signature form
    M6 signature wanted, or known (w)  M7 identifier form  M8 identifier's digits  M9 rank  M10 token count
    M11 canonical text (w, unless asked for)
    C1 to C14 container, see `blob`; prefixed adapter- or draft-
    A1 number of records  A2 fp16  A3 sizes  A4 finite  A5 zero A (w)  A6 every B zero (w)  A7 file size
    D1 draft.mil is empty; and against the toolkit's files: D2 size, D3 bytes outside payloads, D4 draft.mil
    E1 to E4, against a checkpoint: tensor missing, shape, values, surplus (w)
    G1 not made for Apple's model (w)  G2 the stated geometry cannot be

A rule that is broken only because another one is says so (`Finding.cause`), and is not among `PackageReport.broken`.
The container holds no names, so two tensors of equal size that changed places are seen by E3 only.
Nothing in a package makes the check raise, and what it reads and reports is bounded.

Source: agreement with an independent validator is tested, for Apple's geometry, rule by rule.

Rules of a package's draft pair: its container, and D1 to D4; see `fmadapter_check`.

`draft.mil` is the toolkit's file as it is. `draft_weights.bin` is the toolkit's `weights_template.bin` with other
payloads: header, metadata blocks, padding and size never change.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_afm.errors import AFMError, ConfigError, FormatError
from mlx_afm.files import to_optional_path
from mlx_afm.formats.blob import FP16, Blob, Bytes, blob_file_bytes, map_bytes, walk_blobs
from mlx_afm.formats.fmadapter import METADATA_FILE, WEIGHTS_FILE, Tensors
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
from mlx_afm.formats.fmadapter_plan import APPLE_GEOMETRY, Geometry, Record, plan_records, stored_values
from mlx_afm.formats.fmadapter_report import Finding, Findings, PackageReport, shown

__all__ = ["Finding", "PackageReport", "check_fmadapter"]


def check_fmadapter(
    folder: str | Path,
    *,
    expect: Tensors | None = None,
    signature: str | None = None,
    toolkit: str | Path | None = None,
    byte_exact: bool = False,
) -> PackageReport:
    """Checks a package against every rule, with the geometry it states, else Apple's.

    Args:
        folder: the package.
        expect: a checkpoint's adapter tensors by checkpoint name, to compare the values with.
        signature: the base signature wanted, or its first digits (as a device tells them); else a warning is
            given for one that is not public.
        toolkit: the toolkit's folder, or its assets: the draft files are compared with it.
        byte_exact: metadata that is not the canonical text fails.

    Returns:
        The report; a damaged package, or none at all, is a finding and never an exception.

    Raises:
        FormatError: the toolkit's folder does not have what the draft files are compared with.

    Cost: the weights are memory-mapped and read once.
    """
    toolkit = to_optional_path(toolkit)
    found = Findings()
    folder = Path(os.path.abspath(os.path.expanduser(folder)))  # whatever it is: a finding, never an error
    present = _check_files(folder, found)
    geometry = APPLE_GEOMETRY
    if METADATA_FILE in present:
        geometry = check_metadata(folder, signature, byte_exact, found)
    if WEIGHTS_FILE in present:
        _check_weights(folder / WEIGHTS_FILE, plan_records(geometry), expect, found)
    if set(DRAFT_FILES) <= present:
        check_draft(folder, toolkit, found)
    return PackageReport(folder, geometry, found.all())


def _check_files(folder: Path, found: Findings) -> set[str]:
    """P1 to P4; the names of the known files that can be read."""
    if not folder.name.endswith(SUFFIX):
        found.fail("P1", f"the name {shown(folder.name)} does not end in {SUFFIX}")
    try:
        entries = sorted(folder.iterdir())
        regular = {entry.name: entry.is_file() for entry in entries}
    except (OSError, ValueError) as error:
        found.fail("P1", f"not a folder that can be read: {shown(str(error))}")
        return set()
    known = {METADATA_FILE, WEIGHTS_FILE, *DRAFT_FILES}
    for name in (METADATA_FILE, WEIGHTS_FILE):
        if name not in regular:
            found.fail("P2", f"{name} is missing", name)
    for name in sorted(known & set(regular)):
        if not regular[name]:
            found.fail("P2", f"{name} is not a regular file", name)
        elif (folder / name).is_symlink():
            found.warn("P2", f"{name} is a symbolic link: copy the file itself before handing the package on", name)
    if len(set(DRAFT_FILES) & set(regular)) == 1:
        found.fail("P3", f"only one of {' and '.join(DRAFT_FILES)} is there")
    for name in regular:
        if name not in known:
            found.warn("P4", f"unexpected file {shown(name)}")
    return {name for name in known if regular.get(name)}


def _check_weights(path: Path, records: list[Record], expect: Tensors | None, found: Findings) -> None:
    """Container rules, A1 to A7, E1 to E4."""
    fail, warn = partial(found.fail, file=path.name), partial(found.warn, file=path.name)
    try:
        data = map_bytes(path)
    except FormatError as error:
        fail("P2", error.what)
        return
    blobs = walk_blobs(data, lambda rule, message: fail(f"adapter-{rule}", message))
    if len(blobs) != len(records):
        fail("A1", f"{len(blobs)} records, expected {len(records)}")
    live = False
    for index, (blob, record) in enumerate(zip(blobs, records)):
        where = f"record {index} ({record.name})"
        if blob.type_code != FP16:
            fail("A2", f"{where}: type {blob.dtype}, expected fp16")
        elif blob.nbytes != record.nbytes:
            rows, columns = record.stored_shape
            fail("A3", f"{where}: {blob.nbytes} bytes, expected {rows} x {columns} fp16 = {record.nbytes}")
        else:
            live |= _check_values(blob, record, where, found, path.name)
            if expect is not None:
                _compare(blob, record, where, expect, fail)
    if blobs and not live:
        warn("A6", "every B matrix is zero: this adapter changes nothing")
    if len(data) != (size := blob_file_bytes(record.nbytes for record in records)):
        fail("A7", f"the file has {len(data)} bytes, expected {size}")
    if expect is not None:
        for name in sorted(set(expect) - {record.name for record in records}):
            warn("E4", f"checkpoint tensor {shown(name)} has no place in the package")


def _check_values(blob: Blob, record: Record, where: str, found: Findings, file: str) -> bool:
    """A4 and A5; True for a B matrix that is not all zero."""
    values = blob.read()
    if not np.isfinite(values).all():
        found.fail("A4", f"{where}: holds infinities or NaN", file)
    live = bool(values.any())
    is_a = record.name.endswith("a_transpose")
    if is_a and not live:
        found.warn("A5", f"{where}: the A matrix is all zero", file)
    return live and not is_a


def _compare(blob: Blob, record: Record, where: str, expect: Tensors, fail: partial[None]) -> None:
    """E1 to E3."""
    tensor = expect.get(record.name)
    if tensor is None:
        fail("E1", f"{where}: the checkpoint has no such tensor")
    elif tensor.shape != record.shape:
        fail("E2", f"{where}: checkpoint shape {tensor.shape}, expected {record.shape}")
    else:
        try:
            same = stored_values(tensor, record).tobytes() == blob.read().tobytes()
        except AFMError as error:
            fail("E3", f"{where}: the checkpoint's tensor has no fp16 form: {' '.join(str(error).split())}")
        else:
            if not same:
                fail("E3", f"{where}: values differ from the checkpoint's")


DRAFT_FILES = ("draft.mil", "draft_weights.bin")
TOOLKIT_FILES = ("draft.mil", "weights_template.bin")


def check_draft(folder: Path, toolkit: Path | None, found: Findings) -> None:
    """Checks the two draft files, and compares them with the toolkit's if its folder is given.

    Raises:
        FormatError: the toolkit's folder does not have them.
    """
    program, weights = DRAFT_FILES
    try:
        data, text = map_bytes(folder / weights), map_bytes(folder / program)
    except FormatError as error:
        found.fail("P2", error.what, Path(str(error.where)).name)
        return
    if not len(text):
        found.fail("D1", f"{program} is empty", program)
    walk_blobs(data, lambda rule, message: found.fail(f"draft-{rule}", message, weights))
    if toolkit is not None:
        original, template = (map_bytes(path) for path in toolkit_draft_files(toolkit))
        if not np.array_equal(text, original):
            found.fail("D4", f"{program} differs from the toolkit's", program)
        _compare_draft(data, template, found)


def toolkit_draft_files(toolkit: Path) -> tuple[Path, Path]:
    """The toolkit's `draft.mil` and `weights_template.bin`.

    Raises:
        FormatError: they are not there.
    """
    for folder in (toolkit, toolkit / "assets"):
        program, template = (folder / name for name in TOOLKIT_FILES)
        if program.is_file() and template.is_file():
            return program, template
    expected = f"a toolkit folder with {' and '.join(TOOLKIT_FILES)}"
    raise FormatError("no draft assets", where=toolkit, expected=expected)


def _compare_draft(data: Bytes, template: Bytes, found: Findings) -> None:
    """D2 and D3."""
    weights = DRAFT_FILES[1]
    if len(data) != len(template):
        found.fail("D2", f"{len(data)} bytes, the toolkit's template has {len(template)}", weights)
        return
    differs = data != template
    for blob in walk_blobs(template, lambda rule, message: None):
        differs[blob.offset : blob.offset + blob.nbytes] = False
    if differs.any():
        place = int(np.argmax(differs))
        found.fail("D3", f"bytes outside the payloads differ from the toolkit's template, first at {place}", weights)


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
