"""Packages as a whole: round trips, refusals, and a full-size one against coremltools and the oracle validator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_afm.errors import AdapterError, ConfigError, FormatError, TensorsError
from mlx_afm.formats.fmadapter import (
    APPLE_GEOMETRY,
    Geometry,
    Metadata,
    plan_records,
    read_fmadapter,
    stored_values,
    write_fmadapter,
)
from mlx_afm.formats.fmadapter_plan import Rounding
from mlx_afm.formats.tensors import LazyTensor

TINY = Geometry(ordinary_layers=2, reuse_layers=1, hidden=16, heads=2, kv_heads=1, feed_forward=24, rank=2)
TINY_METADATA = Metadata(name="tiny", rank=2, creator_defined={"app": "test"})
FIRST = "layers.segment_0.layer_0.attention.qkv_transform.adapters.base_adapter.lora_0."


def random_tensors(geometry, seed=0):
    rng = np.random.default_rng(seed)
    return {record.name: rng.standard_normal(record.shape, dtype=np.float32) for record in plan_records(geometry)}


def oracle(name):
    """A script of the reference folder beside the checkout."""
    shared = os.environ.get("MLX_AFM_SHARED", Path(__file__).resolve().parents[3] / "shared")
    for path in (Path(shared) / "reference" / name, Path(shared) / name):
        if path.is_file():
            return path
    pytest.skip(f"needs {name} in ../shared/reference or below $MLX_AFM_SHARED")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_smallest_package_byte_for_byte(tmp_path):
    sizes = Geometry(ordinary_layers=1, reuse_layers=0, hidden=4, heads=1, kv_heads=1, feed_forward=2, rank=1)
    tensors = {record.name: np.zeros(record.shape, np.float32) for record in plan_records(sizes)}
    query = "layers.layer_0.attention.qkv_transform.adapters.base_adapter.lora_0."
    tensors[query + "a_transpose"][:, 0] = [1, 2, 3, 4]
    tensors[query + "b_transpose"][0] = [1, 2, 3, 4]  # one head of width four: rows 0 2 1 3
    package = write_fmadapter(tmp_path / "one.fmadapter", tensors, Metadata(name="one", rank=1), sizes)
    data = (package / "adapter_weights.bin").read_bytes()
    assert data[:80].hex() == "0e00000002000000" + 56 * "00" + "efbeadde010000000800000000000000"
    assert data[128:192].hex() == "003c004000420044" + 56 * "00"
    assert data[256:264].hex() == "003c004200400044"
    assert len(data) == 64 + 14 * 128 - 64 + 8
    assert sorted(files(package)) == ["adapter_weights.bin", "metadata.json"]


def test_what_was_written_is_read_back(tmp_path):
    tensors = random_tensors(TINY)
    package = write_fmadapter(tmp_path / "tiny.fmadapter", tensors, TINY_METADATA, TINY)
    metadata, geometry, read = read_fmadapter(package)
    assert (metadata, geometry) == (TINY_METADATA, TINY)
    assert list(read) == [record.name for record in plan_records(TINY)]
    for name, tensor in read.items():
        assert (tensor.dtype, tensor.shape) == ("float16", tensors[name].shape)
        np.testing.assert_array_equal(tensor.read_stored(), tensors[name].astype(np.float16))


def test_writing_what_was_read_gives_the_same_bytes(tmp_path):
    first = write_fmadapter(tmp_path / "a" / "tiny.fmadapter", random_tensors(TINY), TINY_METADATA, TINY)
    metadata, geometry, tensors = read_fmadapter(first)
    second = write_fmadapter(tmp_path / "b" / "tiny.fmadapter", tensors, metadata, geometry)
    assert files(first) == files(second)


def test_order_of_the_mapping_and_laziness_do_not_matter(tmp_path):
    tensors = random_tensors(TINY)
    lazy = {name: LazyTensor.of(tensors[name]) for name in reversed(tensors)}
    first = write_fmadapter(tmp_path / "a" / "tiny.fmadapter", tensors, TINY_METADATA, TINY)
    second = write_fmadapter(tmp_path / "b" / "tiny.fmadapter", lazy, TINY_METADATA, TINY)
    assert files(first) == files(second)


def test_other_geometry_is_stated_in_creator_defined(tmp_path):
    package = write_fmadapter(tmp_path / "tiny.fmadapter", random_tensors(TINY), TINY_METADATA, TINY)
    stated = json.loads((package / "metadata.json").read_bytes())["creatorDefined"]
    assert stated == {"app": "test", "mlx_afm": {"geometry": TINY.__dict__}}


def test_an_existing_package_is_replaced_as_a_whole(tmp_path):
    package = write_fmadapter(tmp_path / "tiny.fmadapter", random_tensors(TINY), TINY_METADATA, TINY)
    (package / "draft.mil").write_text("old")
    write_fmadapter(package, random_tensors(TINY, seed=1), TINY_METADATA, TINY)
    assert sorted(files(package)) == ["adapter_weights.bin", "metadata.json"]
    np.testing.assert_array_equal(
        read_fmadapter(package)[2][FIRST + "b_transpose"].read_stored(),
        random_tensors(TINY, seed=1)[FIRST + "b_transpose"].astype(np.float16),
    )


def test_overflow_names_the_tensor_and_leaves_the_old_package(tmp_path):
    package = write_fmadapter(tmp_path / "tiny.fmadapter", random_tensors(TINY), TINY_METADATA, TINY)
    before, tensors = files(package), random_tensors(TINY, seed=1)
    name = list(tensors)[-1]
    tensors[name][0, 0] = 70000
    with pytest.raises(AdapterError, match=f"{name}: 1 values are too large for fp16"):
        write_fmadapter(package, tensors, TINY_METADATA, TINY)
    assert files(package) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.fmadapter"]


def test_all_wrong_tensors_are_reported_together(tmp_path):
    tensors = random_tensors(TINY)
    missing, misshaped, half, number = list(tensors)[:4]
    del tensors[missing]
    tensors["layers.extra"] = np.zeros(1, np.float32)
    tensors[misshaped] = tensors[misshaped].T
    tensors[half] = LazyTensor("bfloat16", tensors[half].shape, lambda: np.zeros(0, np.uint16))
    tensors[number] = tensors[number].astype(np.int32)
    with pytest.raises(TensorsError) as caught:
        write_fmadapter(tmp_path / "tiny.fmadapter", tensors, TINY_METADATA, TINY)
    assert caught.value.details == (
        f"{missing}: missing",
        "layers.extra: surplus",
        f"{misshaped}: expected shape (2, 16), found (16, 2)",
        f"{half}: expected float32, found bfloat16",
        f"{number}: expected float32, found int32",
    )
    assert not list(tmp_path.iterdir())


def test_place_and_rank_must_belong_to_the_metadata(tmp_path):
    tensors = random_tensors(TINY)
    with pytest.raises(ConfigError, match=r"expected tiny.fmadapter, found other.fmadapter"):
        write_fmadapter(tmp_path / "other.fmadapter", tensors, TINY_METADATA, TINY)
    with pytest.raises(ConfigError, match=r"expected 2, found 32"):
        write_fmadapter(tmp_path / "tiny.fmadapter", tensors, Metadata(name="tiny"), TINY)
    (tmp_path / "tiny.fmadapter").write_text("a file")
    with pytest.raises(FormatError, match="in the way"):
        write_fmadapter(tmp_path / "tiny.fmadapter", tensors, TINY_METADATA, TINY)
    assert (tmp_path / "tiny.fmadapter").read_text() == "a file"


def test_reading_refuses_what_is_no_package(tmp_path):
    with pytest.raises(FormatError, match="no such package folder"):
        read_fmadapter(tmp_path / "none.fmadapter")
    package = write_fmadapter(tmp_path / "tiny.fmadapter", random_tensors(TINY), TINY_METADATA, TINY)
    (package / "adapter_weights.bin").write_bytes(b"\x01")
    with pytest.raises(FormatError, match="C1"):
        read_fmadapter(package)


def test_reading_refuses_records_of_another_geometry(tmp_path):
    package = write_fmadapter(tmp_path / "tiny.fmadapter", random_tensors(TINY), TINY_METADATA, TINY)
    (package / "metadata.json").write_text(TINY_METADATA.text(Geometry(**{**TINY.__dict__, "feed_forward": 26})))
    with pytest.raises(FormatError, match=r"record 9 .*linear_0.*: expected 104 bytes of fp16, found 96 of fp16"):
        read_fmadapter(package)
    (package / "metadata.json").write_text(TINY_METADATA.text(Geometry(**{**TINY.__dict__, "reuse_layers": 2})))
    with pytest.raises(FormatError, match="expected 48 records, found 38"):
        read_fmadapter(package)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_full_size_package_equals_coremltools_and_passes_the_oracle(tmp_path):
    reason = "needs coremltools (extra `parity`)"
    storage = pytest.importorskip("coremltools.libmilstoragepython", reason=reason, exc_type=ImportError)
    validator, tensors = oracle("check_fmadapter.py"), random_tensors(APPLE_GEOMETRY)
    package = write_fmadapter(tmp_path / "full.fmadapter", tensors, Metadata(name="full"))
    weights = package / "adapter_weights.bin"
    assert weights.stat().st_size == 133_312_320

    writer = storage._BlobStorageWriter(str(tmp_path / "theirs.bin"))
    for record in plan_records():
        writer.write_fp16_data(stored_values(tensors[record.name], record).view(np.uint16).reshape(-1))
    del writer  # closes the file
    assert weights.read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    (tmp_path / "theirs.bin").unlink()

    np.savez(tmp_path / "expected.npz", **tensors)
    command = [sys.executable, validator, package, "--summary", "--byte-exact"]
    done = subprocess.run(
        [*command, "--expect", tmp_path / "expected.npz"], capture_output=True, text=True, check=False
    )
    (tmp_path / "expected.npz").unlink()
    weights.unlink()
    assert (done.returncode, done.stdout) == (0, "OK\n"), done.stderr


def test_every_tensor_that_fp16_cannot_hold_is_named(tmp_path):
    tensors = random_tensors(TINY)
    names = list(tensors)
    tensors[names[1]] = np.full_like(tensors[names[1]], 1e5)
    tensors[names[4]][0, 0] = np.nan
    tensors[names[-1]][0, 0] = -np.inf
    with pytest.raises(AdapterError) as error:
        write_fmadapter(tmp_path / "a.fmadapter", tensors, Metadata(name="a", rank=TINY.rank), TINY)
    places = [line.split(":")[0] for line in error.value.details]
    assert places == [names[1], names[4], names[-1]]
    assert "too large for fp16" in error.value.details[0]
    assert "infinite or not numbers" in error.value.details[1]
    assert list(tmp_path.iterdir()) == []


def test_rounding_is_counted_over_all_tensors(tmp_path):
    tensors, rounding = random_tensors(TINY), Rounding()
    write_fmadapter(tmp_path / "a.fmadapter", tensors, Metadata(name="a", rank=TINY.rank), TINY, rounding=rounding)
    errors = {name: np.abs(value - value.astype(np.float16)).max() for name, value in tensors.items()}
    assert rounding.values == sum(value.size for value in tensors.values())
    assert rounding.worst_tensor == max(errors, key=errors.get)
    assert rounding.max_error == pytest.approx(max(errors.values()))
