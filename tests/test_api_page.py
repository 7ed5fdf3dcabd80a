"""`docs/api.md` is what the docstrings say, and whatever a public function takes or gives is public."""

import importlib.util
import inspect
import typing
from pathlib import Path

import pytest

import mlx_afm

ROOT = Path(__file__).resolve().parents[1]


def tool():
    spec = importlib.util.spec_from_file_location("make_api_docs", ROOT / "tools" / "make_api_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current():
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == tool().document(), "run tools/make_api_docs.py"


def types_in(annotation):
    if isinstance(annotation, type):
        yield annotation
    for part in typing.get_args(annotation):
        for one in part if isinstance(part, list) else (part,):
            yield from types_in(one)


@pytest.mark.parametrize("name", [name for name in mlx_afm.__all__ if inspect.isfunction(getattr(mlx_afm, name))])
def test_what_a_public_function_takes_and_gives_is_public(name):
    function = getattr(mlx_afm, name)
    found = {one for hint in typing.get_type_hints(function).values() for one in types_in(hint)}
    ours = {one.__name__ for one in found if one.__module__.startswith("mlx_afm")}
    assert sorted(ours - {*mlx_afm.__all__}) == []
    assert typing.get_type_hints(function).get("return") is not None or name == "register"
