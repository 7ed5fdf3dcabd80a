"""Activations on disk: what was put is found again, by whoever opens the store; what is damaged is missing."""

import errno
import os

import numpy as np
import pytest

from mlx_afm.runs import activation_store
from mlx_afm.runs.activation_store import (
    ENTRY,
    INDEX,
    VALUES,
    DiskStore,
    list_stores,
    remove_store,
    remove_unused_stores,
)

ABOUT = {"base model": "ab", "layers": "5"}
BIG = 1 << 40


def key(number):
    return bytes([number]) * 32


def arrays(number):
    rng = np.random.default_rng(number)
    return [
        rng.standard_normal((number + 1, 8)).astype(np.float32),
        rng.integers(0, 1 << 16, (3, 4)).astype(np.uint16),
        rng.integers(-128, 128, (2, 1, 4)).astype(np.int8),
        np.zeros((0, 8), np.float16),
    ]


def same(found, expected):
    return len(found) == len(expected) and all(
        one.dtype == other.dtype and np.array_equal(one, other) for one, other in zip(found, expected)
    )


@pytest.fixture
def opened(tmp_path):
    stores = []

    def open_store(about=ABOUT, limit=BIG):
        notes = []
        stores.append(DiskStore(tmp_path, about, limit, notes.append))
        stores[-1].notes = notes
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def filled(opened, count=5, **settings):
    store = opened(**settings)
    for number in range(count):
        store.put(key(number), arrays(number))
    return store


def test_what_was_put_is_found_now_and_by_the_next_one(opened):
    for store in (filled(opened), opened()):
        assert len(store) == 5
        assert all(same(store.get(key(number)), arrays(number)) for number in range(5))
        assert store.get(key(9)) is None
        assert key(3) in store
        assert key(9) not in store


def test_another_description_is_another_store(opened):
    filled(opened)
    for about in ({**ABOUT, "layers": "6"}, {**ABOUT, "x": None}):
        assert len(opened(about)) == 0
    assert len(opened({"layers": "5", "base model": "ab"})) == 5  # the order does not matter


def test_two_writers_find_what_the_other_wrote(opened, monkeypatch):
    monkeypatch.setattr(activation_store, "REFRESH_SECONDS", -1.0)
    first, second = opened(), opened()
    first.put(key(1), arrays(1))
    second.put(key(2), arrays(2))
    assert same(second.get(key(1)), arrays(1))
    assert same(first.get(key(2)), arrays(2))
    first.put(key(3), arrays(3))
    assert same(second.get(key(3)), arrays(3))


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_record_cut_off_is_missing_and_can_be_put_again(opened, cut):
    store = filled(opened)
    store.close()
    (values,) = store.folder.glob(f"*{VALUES}")
    os.truncate(values, values.stat().st_size - cut)
    again = opened()
    assert again.get(key(4)) is None
    assert same(again.get(key(3)), arrays(3))
    again.put(key(4), arrays(4))
    assert same(again.get(key(4)), arrays(4))
    assert same(opened().get(key(3)), arrays(3))


def test_an_entry_cut_off_is_no_entry(opened):
    store = filled(opened)
    store.close()
    (index,) = store.folder.glob(f"*{INDEX}")
    os.truncate(index, index.stat().st_size - 10)
    assert len(opened()) == 4


def test_every_flipped_byte_of_a_record_is_noticed(opened):
    store = filled(opened, 1)
    store.close()
    (values,) = store.folder.glob(f"*{VALUES}")
    content = values.read_bytes()
    for place in range(len(content)):
        values.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert opened().get(key(0)) is None


def test_a_full_store_takes_no_more_and_says_so_once(opened):
    size = filled(opened, 2).size_bytes
    store = filled(opened, 5, about={**ABOUT, "other": "1"}, limit=size)
    assert len(store) == 2
    assert len(store.notes) == 1
    assert "no more activations are kept (it has its full size" in store.notes[0]
    assert same(store.get(key(1)), arrays(1))


def test_a_disk_that_is_nearly_full_is_left_alone(opened, monkeypatch):
    monkeypatch.setattr(activation_store, "free_bytes", lambda folder: activation_store.RESERVE_BYTES)
    store = filled(opened)
    assert len(store) == 0
    assert "of the disk are free" in store.notes[0]
    assert not store.folder.exists()


@pytest.mark.parametrize("after", range(9))
def test_a_disk_that_fills_up_leaves_whole_records(opened, monkeypatch, after):
    write, calls = os.write, []

    def failing(descriptor, content):
        calls.append(1)
        if len(calls) <= after:
            return write(descriptor, content)
        if len(calls) == after + 1:
            return write(descriptor, bytes(content)[:3])  # a part of it fits
        raise OSError(errno.ENOSPC, "no room")

    store = opened()
    monkeypatch.setattr(os, "write", failing)
    for number in range(5):
        store.put(key(number), arrays(number))
    monkeypatch.undo()
    kept = after // 2
    assert len(store.notes) == 1
    for one in (store, opened()):
        assert [one.get(key(number)) is not None for number in range(5)] == [number < kept for number in range(5)]


def test_a_place_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    notes = []
    store = DiskStore(tmp_path / "file", ABOUT, BIG, notes.append)
    store.put(key(1), arrays(1))
    assert store.get(key(1)) is None
    assert len(notes) == 1


def test_stores_are_listed_and_removed(opened, tmp_path):
    store = filled(opened)
    (listed,) = list_stores(tmp_path)
    assert (listed["name"], listed["examples"], listed["about"]) == (store.folder.name, 5, ABOUT)
    files = list(store.folder.iterdir())
    assert listed["bytes"] == sum(path.stat().st_size for path in files)
    assert next(store.folder.glob(f"*{INDEX}")).stat().st_size == 5 * ENTRY.size
    remove_store(tmp_path, store.folder.name)
    assert list_stores(tmp_path) == []
    assert same(store.get(key(1)), arrays(1))  # who has it open goes on


def test_stores_that_nobody_uses_are_removed(opened, tmp_path):
    stores = [filled(opened, about={**ABOUT, "layers": str(number)}) for number in range(2)]
    for store in stores:
        for path in store.folder.iterdir():
            os.utime(path, (0, 0))
    opened({**ABOUT, "layers": "1"})  # opening is using
    remove_unused_stores(tmp_path, 30)
    assert [entry["name"] for entry in list_stores(tmp_path)] == [stores[1].folder.name]


def test_only_the_user_can_read_it(opened):
    assert filled(opened).folder.stat().st_mode & 0o077 == 0
