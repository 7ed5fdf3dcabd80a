"""Mutants of the committed checkpoints; `fuzz_torch.py` says what is asked of each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from torch_mutations import mutant

HERE = Path(__file__).parent
FIXTURES = {path.name: path.read_bytes() for path in (HERE / "fixtures").glob("*.pt")}


def fuzz(tmp_path, *options):
    command = [sys.executable, HERE / "fuzz_torch.py", *map(str, options)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert list(tmp_path.iterdir()) == []
    return json.loads(ran.stdout[ran.stdout.index("{") :])


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_every_mutant_is_read_or_refused(tmp_path, count):
    told = fuzz(tmp_path, "--count", count, "--seed", 1)
    assert told["faults"] == []
    assert set(told["outcomes"]) == {"read, equal", "read, other", "refused"}
    assert sum(told["outcomes"].values()) == count
    assert len(told["mutations"]) == 11


def test_a_number_is_enough_to_see_a_mutant_again(tmp_path):
    assert mutant(FIXTURES, 0, 17) == mutant(FIXTURES, 0, 17)
    assert mutant(FIXTURES, 0, 17) != mutant(FIXTURES, 0, 18)
    assert fuzz(tmp_path, "--only", 17)["count"] == 1
