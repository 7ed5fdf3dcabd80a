"""The package check against an independent validator: on every damaged package, and on 2,000 random mutations.

The validator knows Apple's sizes. With others in their place it judges small packages in no time; the damage is done to
full-size packages too.
"""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest

from check_oracle import CheckOracle
from damaged_packages import DAMAGES
from mlx_afm.formats import fmadapter_check
from mlx_afm.formats.fmadapter import APPLE_GEOMETRY, Geometry, Metadata, plan_records, write_fmadapter
from mlx_afm.formats.fmadapter_check import check_fmadapter
from mutated_packages import KNOWN_GAPS, mutate
from package_spoilers import metadata, write_toolkit

pytestmark = [pytest.mark.parity, pytest.mark.slow]

TINY = Geometry(ordinary_layers=2, reuse_layers=1, hidden=16, heads=2, kv_heads=1, feed_forward=24, rank=2)
MUTATIONS, GAP_MUTATIONS = 2000, 20


class Judges:
    """Both validators on packages of one geometry, with all that a package may be checked against."""

    def __init__(self, folder, geometry):
        rng = np.random.default_rng(0)
        tensors = {
            record.name: rng.standard_normal(record.shape, dtype=np.float32) for record in plan_records(geometry)
        }
        self.tensors, self.expected = tensors, folder / "expected.npz"
        np.savez(self.expected, **tensors)
        self.toolkit = write_toolkit(folder / "toolkit") if (folder / "toolkit").mkdir() is None else None
        sound = Metadata(name="plain", rank=geometry.rank)
        self.package = write_fmadapter(folder / "plain.fmadapter", tensors, sound, geometry)
        metadata(creatorDefined={})(self.package)
        self.oracle = CheckOracle(geometry)

    def __call__(self, package, against=""):
        """Our report and the other's verdict."""
        template = ("--draft-template", self.toolkit / "weights_template.bin")
        ours, theirs = {
            "": ({}, ()),
            "signature": ({"signature": "1234567"}, ("--signature", "1234567")),
            "byte_exact": ({"byte_exact": True}, ("--byte-exact",)),
            "toolkit": ({"toolkit": self.toolkit}, (*template, "--draft-mil", self.toolkit / "draft.mil")),
            "expect": ({"expect": self.tensors}, ("--expect", self.expected)),
        }[against]
        return check_fmadapter(package, **ours), self.oracle(package, *theirs)


@pytest.fixture(scope="module")
def small_judges(tmp_path_factory):
    return Judges(tmp_path_factory.mktemp("small"), TINY)


@pytest.fixture
def small(small_judges, monkeypatch):
    """Judges of small packages: their geometry stands for Apple's."""
    for module in (fmadapter_check, fmadapter_check):
        monkeypatch.setattr(module, "APPLE_GEOMETRY", TINY)
    return small_judges


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Judges of full-size packages, removed after the module."""
    folder = tmp_path_factory.mktemp("full")
    yield Judges(folder, APPLE_GEOMETRY)
    shutil.rmtree(folder)


def failed(report):
    return {finding.rule for finding in report.findings if finding.severity == "fail"}


def require_agreement(judges, package, name):
    damage = DAMAGES[name]
    report, verdict = judges(damage.spoil(package) or package, damage.against)
    assert report.ok == damage.warns
    if damage.oracle == "stops":
        assert verdict.stopped
    elif damage.oracle == "passes":
        assert verdict.valid
    else:
        assert verdict.valid == report.ok
        # The other one tells more of the same: it stops later, and names what follows from what.
        assert damage.rule in verdict.fails | verdict.warns
        assert set(report.broken) <= verdict.fails
        assert failed(report) == verdict.fails
    return damage.oracle


@pytest.mark.parametrize("name", DAMAGES)
def test_both_find_the_damage(name, small, tmp_path):
    package = tmp_path / "plain.fmadapter"
    shutil.copytree(small.package, package)
    require_agreement(small, package, name)


@pytest.mark.parametrize("name", [name for name, damage in DAMAGES.items() if not damage.small_only])
def test_both_find_the_damage_at_full_size(name, full, tmp_path):
    package = tmp_path / "plain.fmadapter"
    try:
        shutil.copytree(full.package, package)
        require_agreement(full, package, name)
    finally:
        for path in tmp_path.iterdir():
            shutil.rmtree(path, ignore_errors=True)


def test_the_validator_agrees_but_for_what_is_listed():
    assert Counter(damage.oracle for damage in DAMAGES.values()) == {"": len(DAMAGES) - 4, "stops": 3, "passes": 1}


@pytest.mark.parametrize("against", ["", "byte_exact", "toolkit", "expect"])
@pytest.mark.parametrize("size", ["small", "full"])
def test_sound_packages_pass_both(size, against, request):
    judges = request.getfixturevalue(size)
    report, verdict = judges(judges.package, against)
    assert (report.findings, verdict.fails, verdict.warns, verdict.stopped) == ((), set(), set(), "")
    assert report.fits_device == (size == "full")


def test_both_agree_on_random_mutations(small, tmp_path):
    """Valid or not, on every one of 2,000; the rules themselves where both could go on."""
    seen = Counter()
    for seed in range(MUTATIONS):
        rng, package = np.random.default_rng(seed), tmp_path / "plain.fmadapter"
        shutil.copytree(small.package, package)
        mutated = mutate(package, rng)
        report, verdict = small(mutated)
        assert not verdict.stopped, (seed, verdict.stopped)
        assert report.ok == verdict.valid, (seed, report.findings, verdict)
        seen["valid" if report.ok else "invalid"] += 1
        seen["same rules"] += failed(report) == verdict.fails
        seen["mutations"] += 1
        shutil.rmtree(mutated)
    print(dict(seen))
    assert seen["mutations"] == MUTATIONS
    assert seen["valid"] >= 0.05 * MUTATIONS
    assert seen["invalid"] >= 0.5 * MUTATIONS
    assert seen["same rules"] >= 0.99 * MUTATIONS


@pytest.mark.parametrize("gap", KNOWN_GAPS)
def test_where_they_differ_the_other_one_is_wrong(gap, small, tmp_path):
    """What it is known to get wrong: NaN in JSON passes, a lone surrogate and a folder for a file stop it."""
    for seed in range(GAP_MUTATIONS):
        package = tmp_path / "plain.fmadapter"
        shutil.copytree(small.package, package)
        KNOWN_GAPS[gap](package, np.random.default_rng(seed))
        report, verdict = small(package)
        assert report.broken == ("P2" if gap == "folder" else "M1",)
        assert verdict.valid if gap == "takes NaN" else verdict.stopped
        shutil.rmtree(package)
