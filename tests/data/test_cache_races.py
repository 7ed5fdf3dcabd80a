"""The cache of encoded data when other processes use it too, or were killed while they did."""

from __future__ import annotations

import os
import time

import numpy as np

from mlx_afm.data import find_splits, read
from mlx_afm.data.read import META, read_tokens


def test_what_killed_processes_left_is_no_obstacle(model_folder, data_folder, tmp_path):
    files, tokenizer = find_splits(data_folder)["valid"], model_folder / "tokenizer.model"
    (tmp_path / "tokens" / ".fresh.part").mkdir(parents=True)
    stale = tmp_path / "tokens" / ".stale.part"
    stale.mkdir()
    os.utime(stale, (time.time() - 1e7,) * 2)
    table = read_tokens(files, tokenizer, cache=tmp_path)
    assert not stale.exists()
    (entry,) = [path for path in (tmp_path / "tokens").iterdir() if (path / META).exists()]
    again = read_tokens(files, tokenizer, cache=tmp_path)
    assert isinstance(again.ids, np.memmap)
    assert np.array_equal(again.ids, table.ids)
    (entry / "ids.npy").unlink()  # as if seen while another process replaces it
    assert np.array_equal(read_tokens(files, tokenizer, cache=tmp_path).ids, table.ids)
    assert (entry / "ids.npy").exists()


def test_the_faster_process_wins(model_folder, data_folder, tmp_path, monkeypatch):
    files, tokenizer = find_splits(data_folder)["valid"], model_folder / "tokenizer.model"
    plain, before = read._table, []

    def slowly(*arguments):
        if not before:
            before.append(1)
            read_tokens(files, tokenizer, cache=tmp_path)  # the other process
        return plain(*arguments)

    monkeypatch.setattr(read, "_table", slowly)
    assert len(read_tokens(files, tokenizer, cache=tmp_path)) == 4
    assert len(list((tmp_path / "tokens").iterdir())) == 1
