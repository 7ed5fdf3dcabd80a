"""The independent validator, if it lies beside the checkout: run as it is, or with other sizes in place of Apple's."""

from __future__ import annotations

import contextlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from mlx_afm.formats.fmadapter import APPLE_GEOMETRY, Geometry

SIZES = re.compile(r"^SEG0, SEG1, DIM, KV, FFN, Q_HEADS, KV_HEADS = .*$", re.MULTILINE)


@dataclass(frozen=True)
class Verdict:
    """What the validator says: rules that fail, rules that warn; `stopped` by an exception of its own."""

    fails: frozenset[str]
    warns: frozenset[str]
    stopped: str = ""

    @property
    def valid(self) -> bool:
        return not self.fails and not self.stopped


def oracle_path(name: str = "check_fmadapter.py") -> Path:
    """A script of the reference folder beside the checkout."""
    shared = os.environ.get("MLX_AFM_SHARED", Path(__file__).resolve().parents[3] / "shared")
    for path in (Path(shared) / "reference" / name, Path(shared) / name):
        if path.is_file():
            return path
    pytest.skip(f"needs {name} in ../shared/reference or below $MLX_AFM_SHARED")


class CheckOracle:
    """The validator for one geometry."""

    def __init__(self, geometry: Geometry = APPLE_GEOMETRY) -> None:
        g, source = geometry, oracle_path().read_text(encoding="utf-8")
        width = g.kv_heads * g.head_width
        sizes = (g.ordinary_layers, g.reuse_layers, g.hidden, width, g.feed_forward, g.heads, g.kv_heads)
        source, changed = SIZES.subn(f"SEG0, SEG1, DIM, KV, FFN, Q_HEADS, KV_HEADS = {sizes}", source)
        assert changed == 1, "the validator is not the one that is known"
        self.module, self.rank = ModuleType("check_oracle_script"), geometry.rank
        exec(compile(source, "check_fmadapter.py", "exec"), self.module.__dict__)

    def __call__(self, package: Path, *options: object) -> Verdict:
        printed, stopped = io.StringIO(), ""
        arguments = [str(package), "--summary", "--rank", str(self.rank), *map(str, options)]
        with contextlib.redirect_stdout(printed):
            try:
                code = self.module.main(arguments)
            except Exception as error:  # whatever it stops with is what is to be recorded
                return Verdict(frozenset(), frozenset(), type(error).__name__)
        verdict = printed.getvalue().splitlines()[-1]
        assert (verdict == "OK") == (code == 0)
        warned = re.findall(r"^WARN (\S+): ", printed.getvalue(), re.MULTILINE)
        return Verdict(frozenset(verdict.split()[1:]), frozenset(warned), stopped)
