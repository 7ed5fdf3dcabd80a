"""Oracle folders: the committed ones, and fresh ones where torch, tamm and the script are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle import COMMITTED, FRESH, Oracle, load_oracle, make_oracle

CASES = [
    *(pytest.param(("committed", name), id=name) for name in FRESH),
    *(pytest.param(("fresh", name), id=f"fresh-{name}", marks=pytest.mark.parity) for name in FRESH),
]


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
