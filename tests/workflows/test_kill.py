"""SIGKILL at random moments, for real: `MLX_AFM_KILLS` says how many (24)."""

from __future__ import annotations

import os

import pytest
from kill_driver import kill_and_resume


@pytest.mark.slow
def test_a_killed_run_ends_like_one_that_was_not(tmp_path):
    kills = int(os.environ.get("MLX_AFM_KILLS", "24"))
    tally = kill_and_resume(kills, tmp_path, seed=kills)
    assert tally.unreadable == []
    assert tally.different == []
    assert tally.kills == kills
    assert tally.identical == tally.runs > 0
