"""The file of reference answers and the program in the docs have the same keys; the export tests what it holds."""

import re
from pathlib import Path

from mlx_afm.workflows import reference_answers

DOCS = Path(__file__).parents[2] / "docs" / "devices.md"


def test_the_program_reads_the_keys_that_are_written(monkeypatch, tmp_path):
    written = {}
    monkeypatch.setattr(reference_answers, "load", lambda model, package: (None, None))
    monkeypatch.setattr(reference_answers, "generate", lambda *arguments, **settings: "answer")
    monkeypatch.setattr(reference_answers, "write_json", lambda path, content: written.update(content))
    from mlx_afm.formats.fmadapter import Metadata

    prompts = reference_answers.PROMPTS
    reference_answers.write_reference_answers(tmp_path / "a.fmadapter", Metadata(name="a"), tmp_path, prompts)
    (program,) = re.findall(r"```swift\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    structures = " ".join(re.findall(r"let ([^}={(]*: [^}=({]*)", program[: program.index("@main")]))
    declared = set(re.findall(r"(\w+): \[?(?:String|Int|Step)", structures))
    assert declared == {*written, *written["steps"][0]}
    assert 25 <= len(program.splitlines()) <= 35
