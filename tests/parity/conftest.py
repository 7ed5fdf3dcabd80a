"""Oracle folders: the committed ones, and fresh ones where torch, tamm and the script are at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from oracle import Oracle, load_oracle

COMMITTED = Path(__file__).parent.parent / "fixtures" / "oracle"
SHARED = Path(os.environ.get("MLX_AFM_SHARED", Path(__file__).parents[3] / "shared"))
SCRIPT = SHARED / "reference" / "make_tamm_checkpoint.py"
# The script's default sizes; other head counts; a uniform stack. With and without quantisers.
HEADS = ["--heads", "8", "--kv-heads", "1", "--hidden", "96", "--layers", "2", "--reuse-layers", "3", "--seed", "3"]
UNIFORM = ["--layers", "4", "--reuse-layers", "0", "--seed", "5"]
FRESH = {
    "default": [],
    "heads": HEADS,
    "uniform": UNIFORM,
    "default-plain": ["--no-kv-quant"],
    "heads-plain": [*HEADS, "--no-kv-quant"],
    "uniform-plain": [*UNIFORM, "--no-kv-quant"],
}
CASES = [
    *(pytest.param(("committed", name), id=name) for name in FRESH),
    *(pytest.param(("fresh", name), id=f"fresh-{name}", marks=pytest.mark.parity) for name in FRESH),
]


def make_oracle(folder: Path, *options: str) -> Path:
    """Runs the oracle script."""
    pytest.importorskip("tamm", reason="the parity extra is not installed")
    if not SCRIPT.is_file():
        pytest.skip(f"{SCRIPT} is missing: set MLX_AFM_SHARED")
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(folder), *options], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def fresh_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


def oracle_folder(case: tuple[str, str], made: dict[str, Path], factory: pytest.TempPathFactory) -> Path:
    kind, name = case
    if kind == "committed":
        return COMMITTED / name
    if name not in made:
        made[name] = make_oracle(factory.mktemp("oracle") / name, *FRESH[name])
    return made[name]


@pytest.fixture(params=CASES, scope="session")
def oracle(
    request: pytest.FixtureRequest, fresh_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Oracle:
    return load_oracle(oracle_folder(request.param, fresh_folders, tmp_path_factory))
