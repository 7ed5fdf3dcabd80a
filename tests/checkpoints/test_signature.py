"""The signature in a toolkit's folder: found in the text of its Python, whose content is never run."""

import pytest

from mlx_afm.checkpoints.signature import read_signature
from mlx_afm.errors import FormatError

ONE, OTHER = "ab" * 20, "cd" * 20


def toolkit(folder, **sources):
    (folder / "export").mkdir()
    for name, text in sources.items():
        (folder / "export" / f"{name}.py").write_text(text)
    return folder


@pytest.mark.parametrize(
    "source",
    [
        f'BASE_SIGNATURE = "{ONE}"\n',
        f"SIGNATURE: str = '{ONE}'  # of the base model\n",
        f"def signature():\n    return '{ONE}'\n",
        f'import os\nos.abort()\nclass C:\n    BASE_SIGNATURE="{ONE}"\n',
    ],
)
def test_the_constant_is_found(source, tmp_path):
    folder = toolkit(tmp_path, constants=source, other="x = 1\n")
    assert read_signature(folder) == ONE
    (folder / "assets").mkdir()
    assert read_signature(folder / "assets") == ONE


def test_a_name_decides_between_two(tmp_path):
    text = f'COMMIT = "{OTHER}"\nBASE_SIGNATURE = "{ONE}"\n'
    assert read_signature(toolkit(tmp_path, a=text, b=f"x = '{ONE}'")) == ONE


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": f'A_SIGNATURE = "{ONE}"\n', "b": f'B_SIGNATURE = "{OTHER}"\n'}, "more than one signature"),
        ({"a": f'a = "{ONE}"\nb = "{OTHER}"\n'}, "more than one signature"),
        ({"a": f'a = "{ONE}f"\nb = "{ONE[:39]}"\nc = {ONE}\nd = "{ONE.upper()}"\n'}, "no signature"),
        ({}, "no signature"),
    ],
)
def test_none_or_several_are_refused(sources, message, tmp_path):
    with pytest.raises(FormatError, match=rf"{message}(.|\n)*--signature"):
        read_signature(toolkit(tmp_path, **sources))


def test_a_folder_without_export_is_refused(tmp_path):
    with pytest.raises(FormatError, match="expected a folder named export"):
        read_signature(tmp_path / "nowhere")
