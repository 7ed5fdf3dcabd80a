"""Archives as torch writes them. The hex strings are from a sparse 8 GiB file by torch 2.15 (`skip_data`)."""

import io
import zipfile

import pytest

from mlx_afm.formats.zip_reader import read_members
from mlx_afm.formats.zip_writer import Written, ZipWriter, descriptor, directory_entry, end_records, local_header

GIB = 1 << 30
NAME = b"big/data/1"
SMALL = Written(b"big/data/0", 0, 3 * GIB, 0x356)
LARGE = Written(b"big/data/1", 0, 5 * GIB, 3221226448)
FAR = Written(b"big/data/2", 0, 16, 8589935704)
EMPTY = Written(b"big/data/3", 0, 0, 8589935848)


def archive(*members):
    handle = io.BytesIO()
    writer = ZipWriter(handle)
    for name, content in members:
        writer.add(name, len(content), [content[:2], content[2:]])
    writer.finish()
    return handle.getvalue()


@pytest.mark.parametrize(
    ("member", "flags", "extra", "data_at"),
    [
        (SMALL, "0808", "46423e00" + "5a" * 62, 960),
        (LARGE, "0808", "01001000000000400100000000000040010000004642" + "3000" + "5a" * 48, 3221226560),
        (FAR, "0808", "0100080058040000020000004642" + "3000" + "5a" * 48, 8589935808),
        (EMPTY, "0008", "01000800e8040000020000004642" + "2000" + "5a" * 32, 8589935936),
    ],
)
def test_local_header_is_torch_s_below_and_beyond_4_gib(member, flags, extra, data_at):
    header = local_header(member.name, member.size, member.header)
    length = (len(extra) // 2).to_bytes(2, "little").hex()
    assert header.hex() == f"504b03040000{flags}{'00' * 18}0a00{length}{member.name.hex()}{extra}"
    assert member.header + len(header) == data_at
    assert data_at % 64 == 0


def test_descriptor_is_wide_where_size_or_offset_is():
    assert descriptor(SMALL).hex() == "504b070800000000000000c0000000c0"
    assert descriptor(LARGE).hex() == "504b07080000000000000040010000000000004001000000"
    assert descriptor(FAR).hex() == "504b07080000000010000000000000001000000000000000"
    assert descriptor(EMPTY) == b""


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        (SMALL, "504b010200000000080800000000000000000000000000c0000000c00a0000000000000000000000000056030000"),
        (LARGE, "504b010200000000080800000000000000000000ffffffffffffffff0a00140000000000000000000000d00300c0"),
        (FAR, "504b01020000000008080000000000000000000010000000100000000a000c0000000000000000000000ffffffff"),
        (EMPTY, "504b01020000000000080000000000000000000000000000000000000a000c0000000000000000000000ffffffff"),
    ],
)
def test_directory_entry_is_torch_s(member, expected):
    assert directory_entry(member)[:46].hex() == expected


def test_directory_entry_ends_with_name_and_wide_numbers():
    assert directory_entry(SMALL)[46:] == b"big/data/0"
    assert directory_entry(LARGE)[46:].hex() == NAME.hex() + "0100100000000040010000000000004001000000"
    assert directory_entry(FAR)[56:].hex() == "010008005804000002000000"


def test_end_records_are_torch_s_beyond_4_gib():
    wide = "504b06062c000000000000001e032d0000000000000000000a000000000000000a00000000000000"
    wide += "9f020000000000004006000002000000"
    locator = "504b060700000000df0800000200000001000000"
    end = "504b0506000000000a000a009f020000ffffffff0000"
    assert end_records(10, 0x200000640, 0x29F).hex() == wide + locator + end


def test_directory_of_many_members_saturates_the_plain_count():
    assert end_records(70_000, 10, 20)[-14:-10].hex() == "ffffffff"


def test_the_standard_library_reads_it_and_finds_the_crcs_right():
    members = [("x/a", b"abc"), ("x/empty", b""), ("x/data/0", bytes(range(256)) * 3)]
    with zipfile.ZipFile(io.BytesIO(archive(*members))) as opened:
        assert opened.testzip() is None
        assert [(info.filename, opened.read(info)) for info in opened.infolist()] == members


def test_reading_gives_what_was_written_at_multiples_of_64():
    members = [("x/a", b"abc"), ("x/b", b""), ("x/cé", b"de" * 50)]
    data = archive(*members)
    read = read_members(data, "x")
    assert [(name, data[at : at + size]) for name, (at, size) in read.items()] == members
    assert all(member.offset % 64 == 0 for member in read.values())


def test_an_archive_without_members_has_only_its_end():
    assert archive() == end_records(0, 0, 0)


def test_pieces_that_do_not_add_up_are_a_fault_of_the_caller():
    with pytest.raises(AssertionError, match="2 bytes instead of 3"):
        ZipWriter(io.BytesIO()).add("x", 3, [b"ab"])
