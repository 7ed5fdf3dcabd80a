"""docs/architecture.md says where things are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"


def test_picture_and_table_are_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import make_architecture

    assert PAGE.read_text(encoding="utf-8") == make_architecture.document(), "run python tools/make_architecture.py"


def test_every_path_on_the_page_is_there():
    paths = set(re.findall(r"[a-z_]+(?:/[a-z_0-9]+)*(?:\.py|/)(?=[\s,;`)])", PAGE.read_text(encoding="utf-8")))
    assert len(paths) > 30
    missing = [path for path in paths if not any((ROOT / start / path).exists() for start in ("", "mlx_afm", "docs"))]
    assert missing == []
