"""docs/cli.md says what the commands say."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_commands_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import make_cli_docs

    advice = f"run {Path(sys.executable).name} tools/make_cli_docs.py"
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == make_cli_docs.document(), advice
