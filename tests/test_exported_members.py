"""The public names, and that merely importing them costs nothing."""

import ast
import importlib.metadata
import inspect
import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

import mlx_afm

HEAVY = ("mlx", "mlx.core", "numpy", "mlx_lm", "transformers", "sentencepiece", "yaml", "rich")
HELP_SECONDS = 0.3


@pytest.mark.parametrize("name", mlx_afm.__all__)
def test_a_public_name_is_there_and_described(name):
    member = getattr(mlx_afm, name)
    if name != "__version__":
        assert inspect.getdoc(member)
        assert member.__name__ == name


@pytest.mark.parametrize(("name", "home"), mlx_afm._HOMES.items())
def test_a_public_name_lives_where_it_is_said_to(name, home):
    member = getattr(mlx_afm, name)
    assert member is getattr(import_module(f"mlx_afm.{home}"), name)
    assert f"{member.__module__}.".startswith(f"mlx_afm.{home}.")


def test_the_lists_of_names_agree():
    tree = ast.parse(Path(mlx_afm.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    for_type_checkers = {alias.name: node.module for node in block.body for alias in node.names}
    assert for_type_checkers == {name: f"mlx_afm.{home}" for name, home in mlx_afm._HOMES.items()}
    assert set(mlx_afm.__all__) == {*mlx_afm._HOMES, "__version__"}
    assert dir(mlx_afm) == sorted(mlx_afm.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'mlx_afm' has no attribute 'quantize'"):
        _ = mlx_afm.quantize


def test_the_installed_version_is_the_packages():
    assert importlib.metadata.version("mlx-afm") == mlx_afm.__version__


def heavy_modules_after(code):
    tail = f"\nimport json, sys; print(json.dumps([m for m in {HEAVY} if m in sys.modules]), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def test_importing_the_package_loads_nothing_heavy():
    assert heavy_modules_after("import mlx_afm; dir(mlx_afm); mlx_afm.__version__") == []


def test_loading_models_needs_neither_mlx_lm_nor_transformers():
    loaded = heavy_modules_after("import mlx_afm; mlx_afm.load; mlx_afm.train; mlx_afm.generate")
    assert {"mlx.core", "numpy"} <= set(loaded)
    assert not {"mlx_lm", "transformers"} & set(loaded)


def test_help_loads_nothing_heavy():
    lines = (
        "from mlx_afm_cli.main import main",
        "try: main(['--help'])",
        "except SystemExit as stop: assert not stop.code",
    )
    assert heavy_modules_after("\n".join(lines)) == []


def test_help_answers_at_once():
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "mlx_afm", "--help"], capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - started)
        assert "Convert adapters between their three forms." in done.stdout
    assert min(seconds) < HELP_SECONDS
