"""Finding members, and refusing every archive that contradicts itself."""

import mmap
import struct
import zipfile

import pytest

from mlx_afm.errors import FormatError
from mlx_afm.formats.zip_reader import read_members
from mlx_afm.formats.zip_writer import Written, descriptor, directory_entry, end_records, local_header
from torch_builders import (
    DISK,
    FLAGS,
    HEADER,
    LOCAL_METHOD,
    LOCAL_NAMES,
    LOCAL_SIZE,
    PACKED,
    SIZE,
    archive,
    overlapping,
    put,
    rewrite_end,
    standard,
)

PLAIN = [(b"x/a", b"abc"), (b"x/b", b"defgh")]


def test_members_in_order_with_absent_crcs():
    data = archive(*PLAIN)
    read = read_members(data, "x")
    assert [(name, data[at : at + size]) for name, (at, size) in read.items()] == [("x/a", b"abc"), ("x/b", b"defgh")]


def test_archives_of_other_programs_without_zip64():
    data = standard([("x/", b""), ("x/a", b"abc")])
    member = read_members(data, "x")["x/a"]
    assert data[member.offset : member.offset + member.size] == b"abc"


def test_members_beyond_4_gib_are_found(tmp_path):
    far = 5 << 30
    member = Written(b"x/far", 0, 3, far)
    header, entry = local_header(b"x/far", 3, far), directory_entry(member)
    start = far + len(header) + 3 + len(descriptor(member))
    with (tmp_path / "sparse.zip").open("wb+") as handle:
        handle.seek(far)
        handle.write(header + b"abc" + descriptor(member) + entry + end_records(1, start, len(entry)))
        handle.flush()
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            assert read_members(data, "x") == {"x/far": (far + len(header), 3)}


def test_a_member_of_more_than_4_gib_is_found(tmp_path):
    size = 5 << 30
    member = Written(b"x/large", 0, size, 0)
    header, entry = local_header(b"x/large", size, 0), directory_entry(member)
    with (tmp_path / "sparse.zip").open("wb+") as handle:
        handle.write(header)
        handle.seek(len(header) + size)
        handle.write(descriptor(member) + entry + end_records(1, len(header) + size + 24, len(entry)))
        handle.flush()
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            assert read_members(data, "x") == {"x/large": (len(header), size)}


WHOLE = archive(*PLAIN)
HOSTILE = {
    "nothing": (b"", "no end record"),
    "shorter than an end record": (b"PK\5\6", "no end record"),
    "cut short": (WHOLE[:-1], "cut short"),
    "bytes appended": (WHOLE + b"\0", "no end record"),
    "bytes before": (b"\0" * 64 + WHOLE, "zip64 end record is not before its locator"),
    "comment": (rewrite_end(WHOLE, (-2, "<H", 1)), "comment"),
    "second disk": (rewrite_end(WHOLE, (-18, "<H", 1)), "several disks"),
    "counts differ": (rewrite_end(WHOLE, (-14, "<H", 1)), "several disks"),
    "zip64 differs": (rewrite_end(WHOLE, (-6, "<I", 7)), "zip64 and plain end records differ"),
    "locator elsewhere": (rewrite_end(WHOLE, (-34, "<Q", 1 << 62)), "not before its locator"),
    "locator of two disks": (rewrite_end(WHOLE, (-26, "<I", 2)), "several disks"),
    "zip64 record of other length": (rewrite_end(WHOLE, (-98 + 4, "<Q", 45)), "unknown length"),
    "zip64 without its signature": (rewrite_end(WHOLE, (-98, "<I", 0)), "no zip record"),
    "gap before the end": (archive(*PLAIN, between=b"\0" * 8), "not before its locator"),
    "gap before the zip64 end": (
        rewrite_end(WHOLE, (-98 + 40, "<Q", 90), (-10, "<I", 90)),
        "directory does not end",
    ),
    "directory beyond the file": (
        rewrite_end(WHOLE, (-98 + 48, "<Q", (1 << 64) - 1), (-6, "<I", 0xFFFFFFFF)),
        "directory does not end",
    ),
    "more members than it holds": (
        rewrite_end(WHOLE, (-98 + 24, "<Q", 3), (-98 + 32, "<Q", 3), (-14, "<I", 0x30003)),
        "reaches outside",
    ),
    "a billion members": (end_records(10**9, 0, 0), "too large"),
    "compressed": (standard([("x/a", b"a" * 99)], compression=zipfile.ZIP_DEFLATED), "compressed"),
    "stored, yet of other size": (archive(*PLAIN, change_entry=put(PACKED, "<I", 2)), "compressed"),
    "compressed in the local header only": (archive(*PLAIN, change=put(LOCAL_METHOD, "<H", 8)), "differ"),
    "encrypted": (archive(*PLAIN, change_entry=put(FLAGS, "<H", 0x0809)), "encrypted"),
    "on a second disk": (archive(*PLAIN, change_entry=put(DISK, "<H", 1)), "unknown form"),
    "name twice": (archive((b"x/a", b"abc"), (b"x/a", b"abd")), "occurs twice"),
    "name too long": (archive((b"x/" + b"a" * 511, b"abc")), "too long"),
    "name to the parent": (archive((b"x/../../a", b"abc")), "leads elsewhere"),
    "name from the root": (archive((b"/x/a", b"abc")), "leads elsewhere"),
    "name without a folder's name": (archive((b"x//a", b"abc")), "leads elsewhere"),
    "name with a backslash": (archive((b"x\\..\\a", b"abc")), "leads elsewhere"),
    "name with NUL": (archive((b"x/a\0b", b"abc")), "leads elsewhere"),
    "name not UTF-8": (archive((b"x/\xff", b"abc")), "not UTF-8"),
    "name differs": (archive(*PLAIN, change=put(32, "<B", ord("z"))), "differ"),
    "name longer than the file": (archive(*PLAIN, change=put(LOCAL_NAMES, "<H", 65535)), "differ"),
    "local size differs": (archive(*PLAIN, change=put(LOCAL_SIZE, "<I", 4)), "differ"),
    "local header outside": (archive(*PLAIN, change_entry=put(HEADER, "<I", 1 << 30)), "outside its place"),
    "local header absent": (archive(*PLAIN, change_entry=put(HEADER, "<I", 1)), "no zip record"),
    "same local header": (archive((b"x/a", b"abc"), (b"x/b", b"abc"), change_entry=put(HEADER, "<I", 0)), "differ"),
    "zip64 size without its field": (archive(*PLAIN, change_entry=put(SIZE, "<I", 0xFFFFFFFF)), "sizes are missing"),
    "data beyond the directory": (
        archive((b"x/a", b"abc"), change_entry=lambda entry: struct.pack_into("<II", entry, PACKED, 5000, 5000)),
        "outside the file",
    ),
    "entry longer than the directory": (archive(*PLAIN, change_entry=put(28, "<H", 60000)), "outside the directory"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_contradictions_are_refused_with_their_place(case):
    data, message = HOSTILE[case]
    with pytest.raises(FormatError, match=message) as caught:
        read_members(data, "some.zip")
    assert str(caught.value).startswith("some.zip")


def test_overlapping_members_are_refused():
    with pytest.raises(FormatError, match="'x/outer' and 'x/inner' overlap"):
        read_members(overlapping(), "some.zip")


def test_every_shortened_archive_is_refused():
    for length in range(len(WHOLE)):
        with pytest.raises(FormatError):
            read_members(WHOLE[:length], "some.zip")
