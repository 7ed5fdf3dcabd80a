"""The ladder's file and the program in the docs speak of the same keys; what it holds is tested with the export."""

import re
from pathlib import Path

from mlx_afm.workflows import ladder

DOCS = Path(__file__).parents[2] / "docs" / "devices.md"


def test_the_program_reads_the_keys_that_are_written(monkeypatch, tmp_path):
    written = {}
    monkeypatch.setattr(ladder, "load", lambda model, package: (None, None))
    monkeypatch.setattr(ladder, "generate", lambda *arguments, **settings: "answer")
    monkeypatch.setattr(ladder, "write_json", lambda path, content: written.update(content))
    from mlx_afm.formats.fmadapter import Metadata

    ladder.write_ladder(tmp_path / "a.fmadapter", Metadata(name="a"), tmp_path, ladder.PROMPTS)
    (program,) = re.findall(r"```swift\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    structures = " ".join(re.findall(r"let ([^}={(]*: [^}=({]*)", program[: program.index("@main")]))
    declared = set(re.findall(r"(\w+): \[?(?:String|Int|Step)", structures))
    assert declared == {*written, *written["steps"][0]}
    assert 25 <= len(program.splitlines()) <= 35
