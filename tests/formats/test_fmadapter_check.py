"""Every rule of the package check, on a small package and, against the oracle validator, on a full-size one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_afm.formats.blob import read_blobs, write_blobs
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

TINY = Geometry(ordinary_layers=2, reuse_layers=1, hidden=16, heads=2, kv_heads=1, feed_forward=24, rank=2)
NAN = b"\x00\x7e"


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


# Damage: each function spoils the package it is given, and returns its new path if that changed.


def metadata(**changes):
    """Sets keys (None removes one) and writes the canonical text."""

    def spoil(package):
        path = package / "metadata.json"
        content = {**json.loads(path.read_bytes()), **changes}
        content = {key: value for key, value in content.items() if value is not None}
        path.write_bytes(json.dumps(content, sort_keys=True, indent=4, ensure_ascii=False).encode())

    return spoil


def text(content):
    return lambda package: (package / "metadata.json").write_bytes(content) and None


def patch(record, offset, content, file="adapter_weights.bin"):
    """Overwrites bytes at an offset from a record's metadata (or, for record None, from the file's start)."""

    def spoil(package):
        place = offset if record is None else read_blobs(package / file)[record].metadata_offset + offset
        with (package / file).open("r+b") as handle:
            handle.seek(place)
            handle.write(content)

    return spoil


def append(content):
    def spoil(package):
        with (package / "adapter_weights.bin").open("ab") as handle:
            handle.write(content)

    return spoil


def cut(nbytes):
    def spoil(package):
        os.truncate(package / "adapter_weights.bin", nbytes)

    return spoil


def arrays(change):
    """Rewrites the weights from the flat arrays that `change` gives."""

    def spoil(package):
        path = package / "adapter_weights.bin"
        write_blobs(path, change([np.array(blob.read()) for blob in read_blobs(path)]))

    return spoil


def extra(*names, content=b"x"):
    return lambda package: [(package / name).write_bytes(content) for name in names] and None


def remove(name):
    return lambda package: (package / name).unlink()


def rename(name):
    return lambda package: package.rename(package.with_name(name))


def grow_b(values):
    return [*values[:1], np.append(values[1], values[1]), *values[2:]]


def zero(parity):
    return lambda values: [value * 0 if index % 2 == parity else value for index, value in enumerate(values)]


SIGNATURE = "9799725ff8e851184037110b422d891ad3b92ec1"
BOTH_DRAFTS = ("draft.mil", "draft_weights.bin")
# Name -> (damage, rules that fail, rules that warn); None: it fails, by rules that depend on the size of the file.
# The same damage is done to a full-size package.
DAMAGE = {
    "suffix": (rename("plain.adapter"), "P1", "P5"),
    "no metadata": (remove("metadata.json"), "P2", ""),
    "no weights": (remove("adapter_weights.bin"), "P2", ""),
    "half a draft": (extra("draft.mil"), "P3", ""),
    "draft weights are no blob": (extra(*BOTH_DRAFTS), "draft-C1", ""),
    "draft of another version": (extra(*BOTH_DRAFTS, content=bytes(64)), "draft-C2", ""),
    "stray file": (extra(".DS_Store"), "", "P4"),
    "folder name": (rename("other.fmadapter"), "", "P5"),
    "not an object": (text(b"[]"), "M1", ""),
    "not UTF-8": (text(b'{"a": "\xff"}'), "M1", ""),
    "byte order mark": (text(b"\xef\xbb\xbf{}"), "M1", ""),
    "repeated key": (text(b'{"a": 1, "a": 1}'), "M1", ""),
    "no identifier": (metadata(adapterIdentifier=None), "M2", ""),
    "no author": (metadata(author=None, license=None), "", "M2"),
    "wrong type": (metadata(author=5), "M3", ""),
    "boolean count": (metadata(speculativeDecodingDraftTokenCount=True), "M3", ""),
    "unknown key": (metadata(zebra=1), "", "M4"),
    "signature form": (metadata(baseModelSignature=SIGNATURE.upper()), "M5", ""),
    "unknown signature": (metadata(baseModelSignature=SIGNATURE[:39] + "0"), "", "M6"),
    "hyphen": (metadata(adapterIdentifier="fmadapter-a-b-9799725"), "M7", ""),
    "digits": (metadata(adapterIdentifier="fmadapter-plain-9799726"), "M8", ""),
    "rank": (metadata(loraRank=16), "M9", ""),
    "token count": (metadata(speculativeDecodingDraftTokenCount=0), "M10", ""),
    "final newline": (lambda p: text((p / "metadata.json").read_bytes() + b"\n")(p), "", "M11"),
    "no header": (cut(63), "adapter-C1 A1 A7", ""),
    "empty": (cut(0), "adapter-C1 A1 A7", ""),
    "version": (patch(None, 4, b"\x01"), "adapter-C2 A1", ""),
    "header bytes": (patch(None, 9, b"\x01"), "adapter-C3", ""),
    "one more announced": (lambda p: patch(None, 0, bytes([record_count(p) % 256 + 1]))(p), "adapter-C4", ""),
    "one fewer announced": (lambda p: patch(None, 0, bytes([record_count(p) % 256 - 1]))(p), "adapter-C14 A1", ""),
    "sentinel": (patch(5, 0, b"\x00"), "adapter-C5 A1", ""),
    "type code": (patch(5, 4, b"\x63"), "adapter-C6 A1", ""),
    "payload offset": (patch(5, 16, b"\x02"), None, None),
    "unaligned payload": (lambda p: patch(5, 16, shifted(p, 5, 2))(p), None, None),
    "payload size": (patch(5, 8, b"\xff\xff\xff\xff\xff"), "adapter-C9 A1", ""),
    "odd size": (lambda p: patch(-1, 8, (read_blobs(weights(p))[-1].nbytes - 1).to_bytes(4, "little"))(p), None, None),
    "unused bits": (patch(5, 24, b"\x01"), "adapter-C11", ""),
    "metadata bytes": (patch(5, 40, b"\x01"), "adapter-C12", ""),
    "trailing bytes": (append(bytes(64)), "adapter-C14 A7", ""),
    "other type": (patch(5, 4, b"\x06"), "A2", ""),
    "one record fewer": (arrays(lambda values: values[:-1]), "A1 A7", ""),
    "one record more": (arrays(lambda values: [*values, values[-1]]), "A1 A7", ""),
    "size of a record": (arrays(grow_b), "A3 A7", ""),
    "not a number": (patch(3, 64, NAN), "A4", ""),
    "zero A": (arrays(zero(0)), "", "A5"),
    "zero B": (arrays(zero(1)), "", "A6"),
    "empty draft program": (lambda p: draft(p, program=b""), "D1", ""),
    "sound draft": (lambda p: draft(p, program=b"x"), "", ""),
}


def weights(package):
    return package / "adapter_weights.bin"


def record_count(package):
    return len(read_blobs(weights(package)))


def shifted(package, record, by):
    return (read_blobs(weights(package))[record].offset + by).to_bytes(8, "little")


def draft(package, program):
    (package / "draft.mil").write_bytes(program)
    write_blobs(package / "draft_weights.bin", [np.ones(3, np.float16)])


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
    } in plain["findings"]


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_breaks_the_intended_rules(package, name):
    spoil, fails, warns = DAMAGE[name]
    report = check_fmadapter(spoil(package) or package)
    if name in ("no metadata", "not an object", "not UTF-8", "byte order mark", "repeated key"):
        # Without its geometry a small package is checked as one for Apple's model.
        assert {fails} <= rules(report, "fail") <= {fails, "A1", "A3", "A7"}
    elif fails is not None:
        assert rules(report, "fail") == set(fails.split())
        assert rules(report, "warning") == set(warns.split())
    assert report.ok == (fails == "")


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
    patch(record, offset, content(blob).to_bytes(8, "little"))(package)
    assert broken <= rules(check_fmadapter(package))


def test_payload_of_the_last_record_must_be_whole(package):
    patch(-1, 8, (read_blobs(weights(package))[-1].nbytes - 1).to_bytes(8, "little"))(package)
    assert {"adapter-C10", "A3"} <= rules(check_fmadapter(package), "fail")


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


def swap_first_and_third(values):
    return [values[2], values[1], values[0], *values[3:]]


def test_swapped_records_are_seen_by_comparison_only(package, tiny_tensors):
    arrays(swap_first_and_third)(package)
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
    text(b" " * 1_000_000 + b"{}")(package)
    assert "more than 1000000 bytes" in check_fmadapter(package).findings[0].message
    many = {f"key {index}" + 90 * "x": 1 for index in range(5000)}
    text(json.dumps({**many, "loraRank": {"a": "b" * 100_000}}).encode())(package)
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


def oracle(name):
    """A script of the reference folder beside the checkout."""
    shared = os.environ.get("MLX_AFM_SHARED", Path(__file__).resolve().parents[3] / "shared")
    for path in (Path(shared) / "reference" / name, Path(shared) / name):
        if path.is_file():
            return path
    pytest.skip(f"needs {name} in ../shared/reference or below $MLX_AFM_SHARED")


@pytest.fixture(scope="module")
def apple(tmp_path_factory):
    """A full-size package, its tensors, and the same as an .npz; removed after the module."""
    folder = tmp_path_factory.mktemp("apple")
    tensors = random_tensors(APPLE_GEOMETRY)
    np.savez(folder / "expected.npz", **tensors)
    yield new_package(folder, APPLE_GEOMETRY, tensors), tensors, folder / "expected.npz"
    shutil.rmtree(folder)


def oracle_rules(package, *options):
    """What the oracle says: (rules that fail, rules that warn)."""
    command = [sys.executable, str(oracle("check_fmadapter.py")), str(package), "--summary", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    verdict = done.stdout.splitlines()[-1]
    assert verdict == "OK" or verdict.startswith("INVALID: "), done.stderr
    assert done.returncode == (verdict != "OK")
    return set(verdict.split()[1:]), set(re.findall(r"^WARN (\S+): ", done.stdout, re.MULTILINE))


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGE)
def test_agrees_with_the_oracle_on_full_size_packages(tmp_path, apple, name):
    work = tmp_path / "plain.fmadapter"
    try:
        shutil.copytree(apple[0], work)
        work = DAMAGE[name][0](work) or work
        report = check_fmadapter(work)
        assert (rules(report, "fail"), rules(report, "warning")) == oracle_rules(work)
        assert report.fits_device == report.ok
    finally:
        shutil.rmtree(work)


@pytest.mark.parity
@pytest.mark.slow
def test_agrees_with_the_oracle_on_comparisons(tmp_path, apple):
    package, tensors, expected = apple
    assert rules(check_fmadapter(package, expect=tensors)) == set()
    assert oracle_rules(package, "--expect", expected, "--byte-exact") == (set(), set())
    work = tmp_path / "plain.fmadapter"
    try:
        shutil.copytree(package, work)
        arrays(swap_first_and_third)(work)
        assert rules(check_fmadapter(work, expect=tensors)) == {"E3"}
        assert oracle_rules(work, "--expect", expected) == ({"E3"}, set())
        assert check_fmadapter(work).fits_device
    finally:
        shutil.rmtree(work)
