"""Every rule of the package check, on small packages; `test_fmadapter_oracle` compares with another validator."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from damaged_packages import DAMAGES
from mlx_afm.formats import fmadapter_check
from mlx_afm.formats.blob import read_blobs
from mlx_afm.formats.fmadapter import (
    APPLE_GEOMETRY,
    Geometry,
    Metadata,
    plan_records,
    read_fmadapter,
    write_fmadapter,
)
from mlx_afm.formats.fmadapter_check import check_fmadapter
from mlx_afm.formats.fmadapter_report import MAX_FINDINGS_PER_RULE
from package_spoilers import METADATA, WEIGHTS, metadata, patch, swap, write_toolkit

TINY = Geometry(ordinary_layers=2, reuse_layers=1, hidden=16, heads=2, kv_heads=1, feed_forward=24, rank=2)


def random_tensors(geometry, seed=0):
    rng = np.random.default_rng(seed)
    return {record.name: rng.standard_normal(record.shape, dtype=np.float32) for record in plan_records(geometry)}


def new_package(folder, geometry, tensors):
    return write_fmadapter(folder / "plain.fmadapter", tensors, Metadata(name="plain", rank=geometry.rank), geometry)


@pytest.fixture(scope="module")
def tiny_tensors():
    return random_tensors(TINY)


@pytest.fixture
def package(tmp_path, tiny_tensors):
    return new_package(tmp_path, TINY, tiny_tensors)


def rules(report, severity=None):
    """The ids of the broken rules; G1, which every small package breaks, aside."""
    return {f.rule for f in report.findings if severity in (None, f.severity)} - {"G1"}


def weights(package):
    return package / WEIGHTS


def patch_record(package, record, offset, content):
    """Overwrites bytes at an offset from a record's metadata."""
    patch(read_blobs(weights(package))[record].metadata_offset + offset, content)(package)


@pytest.fixture
def apples_are_tiny(monkeypatch):
    """Lets the small geometry stand for Apple's, so that a small package need not state it."""
    for module in (fmadapter_check, fmadapter_check):
        monkeypatch.setattr(module, "APPLE_GEOMETRY", TINY)


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory):
    return write_toolkit(tmp_path_factory.mktemp("toolkit"))


def test_sound_package_has_no_findings_but_its_geometry(package, tiny_tensors):
    report = check_fmadapter(package, expect=tiny_tensors, signature="9799725")
    assert report.ok
    assert not report.fits_device
    assert report.geometry == TINY
    (finding,) = report.findings
    assert (finding.rule, finding.severity, finding.file) == ("G1", "warning", "metadata.json")
    assert finding.message.startswith("no device would take this package: it is not made for Apple's model")


def test_report_is_plain_json(package):
    metadata(loraRank=3)(package)
    report = check_fmadapter(package)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain == report.to_dict()
    assert (plain["package"], plain["ok"], plain["fits_device"]) == (str(package), False, False)
    assert plain["geometry"] == TINY.__dict__
    assert {
        "rule": "M9",
        "severity": "fail",
        "message": "loraRank 3, expected 2",
        "file": "metadata.json",
        "cause": "",
    } in plain["findings"]
    assert plain["broken"] == ["M9"]


def test_enough_damage_is_done_and_every_rule_is_broken():
    assert len(DAMAGES) >= 40
    container = {f"{tag}-C{number}" for tag in ("adapter", "draft") for number in range(1, 15)}
    others = {f"P{n}" for n in range(1, 6)} | {f"M{n}" for n in range(1, 12)} | {f"A{n}" for n in range(1, 7)}
    # A7 cannot be broken alone: every byte of a file belongs to a record or breaks a container rule. E1, E2 and
    # E4 are about the checkpoint; see below.
    assert {damage.rule for damage in DAMAGES.values()} == container | others | {"D1", "D2", "D3", "D4", "E3"}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_check_names_exactly_the_rule_that_is_broken(name, package, tiny_tensors, toolkit, apples_are_tiny):
    damage = DAMAGES[name]
    metadata(creatorDefined={})(package)
    options = {
        "signature": {"signature": "1234567"},
        "byte_exact": {"byte_exact": True},
        "toolkit": {"toolkit": toolkit},
        "expect": {"expect": tiny_tensors},
    }.get(damage.against, {})
    if damage.against != "signature":
        assert check_fmadapter(package, **options).findings == ()
    report = check_fmadapter(damage.spoil(package) or package, **options)
    warned = {finding.rule for finding in report.findings if finding.severity == "warning"}
    if damage.warns:
        assert (report.broken, warned) == ((), {damage.rule})
    else:
        assert report.broken == (damage.rule,)
        # What a folder's name and a file without content lead to is told as well.
        assert warned <= {"P5", "A6"}
    assert report.ok == damage.warns


@pytest.mark.parametrize("name", ["no metadata", "metadata is empty", "not UTF-8"])
def test_a_small_package_without_its_geometry_is_not_blamed_for_its_weights(name, package):
    report = check_fmadapter(DAMAGES[name].spoil(package) or package)
    assert report.broken == (DAMAGES[name].rule,)
    assert {finding.rule for finding in report.findings if finding.cause} == {"A1", "A3", "A7"}


@pytest.mark.parametrize(
    ("record", "offset", "content", "broken"),
    [
        (5, 16, lambda b: b.offset + 64, {"adapter-C5", "adapter-C7", "A1"}),
        (5, 16, lambda b: b.offset + 2, {"adapter-C7", "adapter-C8"}),
        (5, 16, lambda b: b.offset - 64, {"adapter-C7", "adapter-C9", "A1"}),
        (5, 16, lambda b: 2**63, {"adapter-C7", "adapter-C9"}),
        (5, 8, lambda b: b.nbytes - 1, {"adapter-C10", "adapter-C13", "A3"}),
        (3, 100, lambda b: 1, {"adapter-C13"}),
    ],
)
def test_offsets_and_sizes(package, record, offset, content, broken):
    blob = read_blobs(weights(package))[record]
    patch_record(package, record, offset, content(blob).to_bytes(8, "little"))
    assert broken <= rules(check_fmadapter(package))


def test_signature_may_be_asked_for(package):
    assert "M6" not in rules(check_fmadapter(package, signature="9799725"))
    assert "M6" in rules(check_fmadapter(package, signature="1234567"), "fail")
    metadata(baseModelSignature="ab" * 20, adapterIdentifier="fmadapter-plain-abababa")(package)
    assert rules(check_fmadapter(package, signature="abababa")) == set()


def test_comparison_with_a_checkpoint(package, tiny_tensors):
    first, second, third, fourth = list(tiny_tensors)[:4]
    other = {**tiny_tensors, "layers.extra": np.zeros(1), second: tiny_tensors[second].T}
    other[third] = tiny_tensors[third] + 1
    other[fourth] = np.full_like(tiny_tensors[fourth], 1e9)
    del other[first]
    report = check_fmadapter(package, expect=other)
    found = [(f.rule, f.severity) for f in report.findings if f.rule.startswith("E")]
    assert found == [("E1", "fail"), ("E2", "fail"), ("E3", "fail"), ("E3", "fail"), ("E4", "warning")]
    assert "1e+09" in next(f.message for f in report.findings if "no fp16 form" in f.message)


def test_swapped_records_are_seen_by_comparison_only(package, tiny_tensors):
    swap(0, 2)(package)
    assert rules(check_fmadapter(package)) == set()
    assert rules(check_fmadapter(package, expect=tiny_tensors)) == {"E3"}


@pytest.mark.parametrize(
    "ours", [{"geometry": {}}, {"geometry": None}, {"geometry": {**TINY.__dict__, "hidden": 10**12}}, 5]
)
def test_geometry_that_cannot_be_fails(package, ours):
    metadata(creatorDefined={"mlx_afm": ours})(package)
    report = check_fmadapter(package)
    assert "G2" in rules(report, "fail")
    assert report.geometry == APPLE_GEOMETRY


def test_another_rank_of_apples_model_is_warned_about(tmp_path):
    sizes = Geometry(rank=1)
    package = new_package(tmp_path, sizes, {r.name: np.ones(r.shape, np.float32) for r in plan_records(sizes)})
    report = check_fmadapter(package)
    assert [f.rule for f in report.findings] == ["G1"]
    assert "no device is known to take LoRA rank 1" in report.findings[0].message
    assert not report.fits_device
    weights(package).unlink()


def test_hostile_packages_give_findings(tmp_path, package, tiny_tensors):
    assert rules(check_fmadapter(tmp_path / "none.fmadapter")) == {"P1"}
    assert rules(check_fmadapter(tmp_path / "a\0b")) == {"P1"}
    (tmp_path / "file.fmadapter").write_text("x")
    assert rules(check_fmadapter(tmp_path / "file.fmadapter")) == {"P1"}
    weights(package).rename(tmp_path / "elsewhere")
    weights(package).symlink_to(tmp_path / "elsewhere")
    report = check_fmadapter(package)
    assert report.ok
    assert rules(report) == {"P2"}
    for target in (tmp_path / "nowhere", Path("adapter_weights.bin"), Path("/dev/zero"), tmp_path):
        weights(package).unlink()
        weights(package).symlink_to(target)
        assert rules(check_fmadapter(package), "fail") == {"P2"}
    weights(package).unlink()
    os.mkfifo(weights(package))
    (package / "metadata.json").unlink()
    (package / "metadata.json").mkdir()
    assert rules(check_fmadapter(package), "fail") == {"P2"}


def test_metadata_bombs_are_bounded(package):
    (package / METADATA).write_bytes(b" " * 1_000_000 + b"{}")
    assert "more than 1000000 bytes" in check_fmadapter(package).findings[0].message
    many = {f"key {index}" + 90 * "x": 1 for index in range(5000)}
    (package / METADATA).write_bytes(json.dumps({**many, "loraRank": {"a": "b" * 100_000}}).encode())
    report = check_fmadapter(package)
    unknown = [f.message for f in report.findings if f.rule == "M4"]
    assert len(unknown) == MAX_FINDINGS_PER_RULE + 1
    assert unknown[-1] == "... and 4960 more of this kind"
    assert max(len(f.message) for f in report.findings) < 300


@settings(max_examples=60, deadline=None)
@given(
    file=st.sampled_from(["metadata.json", "adapter_weights.bin"]),
    patches=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8)), max_size=3),
    length=st.one_of(st.none(), st.integers(0, 600)),
)
def test_any_damage_is_found_or_harmless(tmp_path_factory, tiny_tensors, file, patches, length):
    folder = tmp_path_factory.mktemp("damaged")
    package = new_package(folder, TINY, tiny_tensors)
    content = bytearray((package / file).read_bytes())
    for offset, piece in patches:
        content[offset : offset + len(piece)] = piece
    (package / file).write_bytes(content[:length])
    report = check_fmadapter(package)
    if report.ok:
        read_fmadapter(package)
    shutil.rmtree(folder)
