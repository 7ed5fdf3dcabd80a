"""The base model's signature, as the toolkit's folder states it: a constant in the Python of its `export` folder.

The files are searched as text and never run.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlx_afm.errors import FormatError
from mlx_afm.files import visible

MAX_SOURCE_BYTES = 1 << 20
MAX_SOURCES = 200
_QUOTED = re.compile(rb"""(?P<name>\w*)\s*(?::[^=\n]*)?=?\s*(?P<quote>["'])(?P<digits>[0-9a-f]{40})(?P=quote)""")
ADVICE = "Give it with --signature: 40 hex digits, whose first 7 a device tells (compatibleAdapterIdentifiers)."


def read_signature(toolkit: Path) -> str:
    """The signature in a toolkit's folder (or the folder its `assets` lie in).

    Raises:
        FormatError: there is none, or more than one that could be it.
    """
    folders = [folder for folder in (toolkit / "export", toolkit.parent / "export") if folder.is_dir()]
    if not folders:
        raise FormatError("no signature", where=toolkit, expected="a folder named export", advice=ADVICE)
    sources = visible(folders[0].glob("*.py"))[:MAX_SOURCES]
    found = [match for path in sources for match in _QUOTED.finditer(_head(path))]
    named = [match for match in found if b"SIGNATURE" in match["name"].upper()]
    signatures = sorted({match["digits"].decode() for match in named or found})
    if len(signatures) != 1:
        expected = "one constant of 40 hex digits in its Python files"
        raise FormatError(
            "no signature" if not signatures else "more than one signature",
            where=folders[0],
            expected=expected,
            found=", ".join(signatures[:5]) or "none",
            advice=ADVICE,
        )
    return signatures[0]


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            return handle.read(MAX_SOURCE_BYTES)
    except OSError as error:
        raise FormatError(f"cannot be read: {error}", where=path) from error
