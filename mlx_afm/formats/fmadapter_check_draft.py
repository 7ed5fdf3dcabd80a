"""Rules of a package's draft pair: its container, and D1 to D4; see `fmadapter_check`.

`draft.mil` is the toolkit's file as it is. `draft_weights.bin` is the toolkit's `weights_template.bin` with other
payloads: header, metadata blocks, padding and size never change.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlx_afm.errors import FormatError
from mlx_afm.formats.blob import Bytes, map_bytes, walk_blobs
from mlx_afm.formats.fmadapter_report import Findings

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
        _compare(data, template, found)


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


def _compare(data: Bytes, template: Bytes, found: Findings) -> None:
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
