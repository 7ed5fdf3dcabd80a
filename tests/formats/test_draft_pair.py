"""The draft pair: values by the spec's forms, and not one byte changed that is not a value."""

import struct

import numpy as np
import pytest
import yaml

from draft_fixtures import (
    BITS,
    CONFIG,
    FP16,
    FP32,
    HEAD_WIDTH,
    HEADS,
    INT4,
    KV_HEADS,
    LAYERS,
    PROGRAM,
    UINT4,
    blob_file,
    write_draft_assets,
)  # fmt: skip
from mlx_afm.errors import FormatError
from mlx_afm.formats.blob import read_blobs, walk_blobs
from mlx_afm.formats.draft_pair import DraftPair, halves_of_pairs, spec_tensors
from mlx_afm.formats.draft_spec import LEAST_SCALE, encode, pack_nibbles, parse_spec
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.formats.torch_file import read_torch

LAYER = "decoder.transformer.layer0."
ATTENTION = LAYER + "self_attention.attention."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_draft_assets(tmp_path_factory.mktemp("draft") / "assets")


@pytest.fixture
def assets(tmp_path):
    return write_draft_assets(tmp_path / "assets")


def pair_of(assets):
    document = yaml.safe_load((assets.folder / "checkpoint_spec.yaml").read_text(encoding="utf-8"))
    tensors = spec_tensors(read_torch(assets.checkpoint), heads=HEADS, kv_heads=KV_HEADS, where=assets.checkpoint)
    return DraftPair(
        assets.folder / "draft.mil",
        assets.folder / "weights_template.bin",
        parse_spec(document, where="checkpoint_spec.yaml"),
        tensors,
    )


@pytest.fixture(scope="module")
def written(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    pair_of(made).checked().write(folder)
    return folder


def stored(folder, assets, name):
    """Blob -> the values of a tensor's records, codes one by one."""
    blobs = {blob.metadata_offset: blob for blob in read_blobs(folder / "draft_weights.bin")}
    values = {}
    for role, place in assets.spec["weights_mapping"][name]["blobs"].items():
        blob = blobs[place["offset"]]
        values[role] = blob.read()
        if blob.type_code in (INT4, UINT4):
            nibbles = np.stack([values[role] & 15, values[role] >> 4], axis=1).reshape(-1)
            values[role] = nibbles.astype(np.int8)
            if blob.type_code == INT4:
                values[role] -= 16 * (values[role] > 7)
    return values


def reference_tensors(state):
    """The spec's tensors by loops over heads, and nothing of the library."""

    def pairs_to_halves(rows, heads):
        order = []
        for head in range(heads):
            order += [head * HEAD_WIDTH + i for i in range(0, HEAD_WIDTH, 2)]
            order += [head * HEAD_WIDTH + i for i in range(1, HEAD_WIDTH, 2)]
        return rows[order]

    named = {
        "decoder.emb.token_emb._embedding": state["embedding.weight"],
        "decoder.output_norm.scale": state["output_norm.weight"],
    }
    for index in range(LAYERS):
        ours, theirs = f"layers.layer_{index}.", f"decoder.transformer.layer{index}."
        attention = theirs + "self_attention.attention."
        q, k = HEADS * HEAD_WIDTH, KV_HEADS * HEAD_WIDTH
        fused = state[ours + "attention.qkv_transform.fused_linear.weight"]
        named |= {
            theirs + "self_attention.norm.scale": state[ours + "attention.norm.weight"],
            attention + "i_proj.qkv_proj.q_proj.kernel": pairs_to_halves(fused[:q], HEADS),
            attention + "i_proj.qkv_proj.k_proj.kernel": pairs_to_halves(fused[q : q + k], KV_HEADS),
            attention + "i_proj.qkv_proj.v_proj.kernel": fused[q + k :],
            attention + "scale_query.scale": pairs_to_halves(state[ours + "attention.qk_norm.query_norm.weight"], 1),
            attention + "scale_key.scale": pairs_to_halves(state[ours + "attention.qk_norm.key_norm.weight"], 1),
            attention + "o_proj.conv.kernel": state[ours + "attention.output_transform.weight"],
            theirs + "feed_forward.norm.scale": state[ours + "feed_forward.norm.weight"],
            theirs + "feed_forward.linear1_0.kernel": state[ours + "feed_forward.hidden_transform.linear_0.weight"],
            theirs + "feed_forward.linear1_1.kernel": state[ours + "feed_forward.hidden_transform.linear_1.weight"],
            theirs + "feed_forward.linear2.kernel": state[ours + "feed_forward.output_transform.weight"],
        }
    return named


def test_every_tensor_gets_its_name_and_its_rows(made):
    found = spec_tensors(read_torch(made.checkpoint), heads=HEADS, kv_heads=KV_HEADS, where="x")
    wanted = reference_tensors(made.state)
    assert set(found) == set(wanted) == set(made.spec["weights_mapping"])
    for name, values in wanted.items():
        assert found[name].shape == values.shape
        np.testing.assert_array_equal(found[name].read_stored(), values)


def test_a_leading_model_is_dropped(made):
    plain = read_torch(made.checkpoint)
    prefixed = {f"model.{name}": tensor for name, tensor in plain.items()}
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "where": "x"}
    assert list(spec_tensors(prefixed, **sizes)) == list(spec_tensors(plain, **sizes))


def test_the_order_within_a_head():
    np.testing.assert_array_equal(halves_of_pairs(np.arange(6), heads=1), [0, 2, 4, 1, 3, 5])
    np.testing.assert_array_equal(halves_of_pairs(np.arange(8), heads=2), [0, 2, 1, 3, 4, 6, 5, 7])


def test_the_program_is_copied_and_only_values_change(made, written):
    assert (written / "draft.mil").read_bytes() == PROGRAM
    after = bytearray((written / "draft_weights.bin").read_bytes())
    before = bytearray(made.template)
    assert len(after) == len(before)
    assert after != before
    places = {place["offset"] for tensor in made.spec["weights_mapping"].values() for place in tensor["blobs"].values()}
    for (code, count), place in zip(made.records, made.places):
        size = -(-count * BITS[code] // 8)
        if place in places:
            assert after[place + 64 : place + 64 + size] != before[place + 64 : place + 64 + size]
            after[place + 64 : place + 64 + size] = before[place + 64 : place + 64 + size]
    assert after == before


def test_fp16_values_are_the_rounded_ones(made, written):
    wanted = reference_tensors(made.state)
    for name, tensor in made.spec["weights_mapping"].items():
        if tensor["format"] == "fp16":
            values = stored(written, made, name)["values"]
            np.testing.assert_array_equal(values, wanted[name].astype(np.float16).reshape(-1).astype(values.dtype))


def test_linear_codes_and_scales(made, written):
    wanted = reference_tensors(made.state)
    for name in ("decoder.emb.token_emb._embedding", *(f"decoder.transformer.layer{i}.feed_forward.linear2.kernel"
                                                       for i in range(LAYERS))):  # fmt: skip
        found, weights = stored(written, made, name), wanted[name]
        scales = np.abs(weights).max(axis=0) / np.float32(7)
        np.testing.assert_array_equal(found["scales"].astype(np.float16), scales.astype(np.float16))
        codes = found["values"].reshape(weights.shape)
        assert codes.min() == -7
        assert codes.max() == 7
        assert np.abs(codes * scales - weights).max() <= 0.5001 * scales.max()
        np.testing.assert_array_equal(codes, np.rint(weights / scales))


def test_palettes_are_the_best_there_are_and_ascend(made, written):
    wanted = reference_tensors(made.state)
    for name, tensor in made.spec["weights_mapping"].items():
        if tensor["format"] != "lut_4bits":
            continue
        found, weights = stored(written, made, name), wanted[name]
        scales = np.abs(weights).max(axis=1)
        np.testing.assert_array_equal(found["scales"].astype(np.float16), scales.astype(np.float16))
        palettes, codes = found["lut_palette"].reshape(-1, 16), found["lut_indices"].reshape(weights.shape)
        assert (np.diff(palettes.astype(np.float32), axis=1) > 0).all()
        normal = weights / scales[:, None]
        for group, palette in enumerate(palettes.astype(np.float32)):
            rows = slice(16 * group, 16 * group + 16)
            error = np.abs(normal[rows] - palette[codes[rows]])
            nearest = np.abs(normal[rows][..., None] - palette).min(axis=-1)
            assert (error <= nearest + 2e-3).all()  # the palette is rounded after the choice


def test_the_same_input_gives_the_same_bytes(made, written, tmp_path):
    pair_of(made).checked().write(tmp_path)
    for name in ("draft.mil", "draft_weights.bin"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_rows_of_zeros_and_tiny_columns():
    weights = np.zeros((32, 4), np.float32)
    weights[1] = [1, -2, 0.5, 1e-9]
    blobs = encode(weights, "lut_4bits", "x")
    assert blobs["scales"].tolist() == [1, 2] + [1] * 30
    assert blobs["lut_palette"][0, :5].tolist() == [-1, 0, np.float16(5e-10), 0.25, 0.5]
    assert blobs["lut_palette"][1].tolist() == [0] * 16
    assert blobs["lut_indices"][1].tolist() == [4, 0, 3, 2]
    linear = encode(weights, "linear_4bits", "x")
    assert linear["scales"][3] == np.float16(LEAST_SCALE)
    assert linear["values"][1].tolist() == [7, -7, 7, 0]


def test_nibbles_are_packed_first_element_low():
    assert pack_nibbles(np.array([1, -2, 3], np.int8)).tobytes() == bytes([0xE1, 0x03])
    assert pack_nibbles(np.array([1, 2, 15], np.uint8)).tobytes() == bytes([0x21, 0x0F])


# --- hostile and wrong


def first(document):
    return document["weights_mapping"]["decoder.emb.token_emb._embedding"]


def lut(document):
    return document["weights_mapping"][ATTENTION + "i_proj.qkv_proj.q_proj.kernel"]


def at(entry, role):
    return entry["blobs"][role]


SPECS = {
    "outside": (lambda d: at(first(d), "values").update(offset=1 << 40), "no metadata block there"),
    "payload": (lambda d: at(first(d), "values").update(offset=at(first(d), "values")["offset"] + 64), "no metadata"),
    "header": (lambda d: at(first(d), "values").update(offset=0), "no metadata block there"),
    "overlap": (lambda d: at(lut(d), "scales").update(offset=at(first(d), "scales")["offset"]), "the place of"),
    "twice": (lambda d: at(lut(d), "scales").update(offset=at(lut(d), "lut_palette")["offset"]), "the place of"),
    "type": (lambda d: at(lut(d), "lut_indices").update(offset=at(lut(d), "scales")["offset"]), "expected uint4 or"),
    "size": (lambda d: first(d).update(shape=[16, 32]), "expected 256 bytes for 512 of int4"),
    "negative": (lambda d: at(first(d), "values").update(offset=-64), "an offset and nothing else"),
    "fraction": (lambda d: at(first(d), "values").update(offset=64.0), "an offset and nothing else"),
    "truth": (lambda d: at(first(d), "values").update(offset=True), "an offset and nothing else"),
    "extra": (lambda d: at(first(d), "values").update(size=4), "an offset and nothing else"),
    "format": (lambda d: first(d).update(format="linear_8bits"), "'linear_8bits' is not one of fp16, linear_4bits"),
    "formats": (lambda d: first(d).update(format=["fp16"]), "is not one of"),
    "role": (lambda d: first(d)["blobs"].pop("scales"), "blobs: expected values, scales"),
    "roles": (lambda d: first(d).update(blobs=[1]), "blobs: expected values, scales"),
    "shape": (lambda d: first(d).update(shape=[64, -32]), "no list of sizes"),
    "zero": (lambda d: first(d).update(shape=[0, 32]), "no list of sizes"),
    "huge": (lambda d: first(d).update(shape=[1 << 40, 1 << 40]), "no list of sizes"),
    "vector": (lambda d: first(d).update(shape=[2048]), "is for matrices"),
    "group": (lambda d: lut(d).update(shape=[8, 128]), "no multiple of that"),
    "key": (lambda d: first(d).update(axis=1), "expected the keys format, shape and blobs, found 'axis', 'blobs'"),
    "entry": (lambda d: d["weights_mapping"].update({"x": 3}), "expected the keys format, shape and blobs"),
    "name": (lambda d: d["weights_mapping"].update({5: first(d)}), "5: expected the keys"),
    "top": (lambda d: d.update(version=2), "key 'version' is not known"),
    "empty": (lambda d: d.update(weights_mapping={}), "not a checkpoint spec"),
    "missing": (lambda d: d["weights_mapping"].update(x=d["weights_mapping"].pop(LAYER + "feed_forward.norm.scale")),
                "x: missing"),
    "surplus": (lambda d: d["weights_mapping"].pop(LAYER + "feed_forward.norm.scale"),
                LAYER + "feed_forward.norm.scale: the spec has no place for it"),
    "mismatch": (lambda d: d["weights_mapping"][ATTENTION + "o_proj.conv.kernel"].update(shape=[16, 64]),
                 "o_proj.conv.kernel: expected shape (16, 64), found (32, 32)"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECS)
def test_a_wrong_spec_is_one_error(case, assets):
    change, says = SPECS[case]
    document = yaml.safe_load((assets.folder / "checkpoint_spec.yaml").read_text())
    change(document)
    with pytest.raises(FormatError) as error:
        DraftPair(
            assets.folder / "draft.mil",
            assets.folder / "weights_template.bin",
            parse_spec(document, where="checkpoint_spec.yaml"),
            pair_of(assets).tensors,
        ).checked()
    assert says in str(error.value)


def test_all_faults_come_together(assets):
    def change(document):
        at(first(document), "values").update(offset=7)
        at(lut(document), "scales").update(offset=8)

    assets.write_spec(change)
    with pytest.raises(FormatError) as error:
        pair_of(assets).checked()
    assert len(error.value.details) == 2


@pytest.mark.parametrize("document", [None, [], "x", 3, {}, {"weights_mapping": []}, {"weights_mapping": None}])
def test_other_documents_are_no_spec(document):
    with pytest.raises(FormatError, match="not a checkpoint spec"):
        parse_spec(document, where="x")


def cut(data, assets):
    return data[:-1]


def longer(data, assets):
    return data + bytes(64)


def sentinel(data, assets):
    place = assets.places[4]
    return data[:place] + b"\0" + data[place + 1 :]


def other_size(data, assets):
    place = assets.places[2] + 8
    return data[:place] + struct.pack("<Q", 3) + data[place + 8 :]


def payload_elsewhere(data, assets):
    place = assets.places[2] + 16
    return data[:place] + struct.pack("<Q", 64) + data[place + 8 :]


def version(data, assets):
    return data[:4] + b"\3" + data[5:]


def nothing(data, assets):
    return b""


@pytest.mark.parametrize(
    "damage", [cut, longer, sentinel, other_size, payload_elsewhere, version, nothing], ids=lambda f: f.__name__
)
def test_a_damaged_template_is_one_error(damage, assets):
    (assets.folder / "weights_template.bin").write_bytes(damage(assets.template, assets))
    with pytest.raises(FormatError, match="weights_template"):
        pair_of(assets).checked()


def test_a_template_of_other_types_is_one_error(assets):
    records = [(FP32 if code == UINT4 else FP16 if code == INT4 else code, count) for code, count in assets.records]
    data, _ = blob_file(records)
    (assets.folder / "weights_template.bin").write_bytes(data)
    with pytest.raises(FormatError, match="the spec does not fit the template"):
        pair_of(assets).checked()


def test_an_empty_program_is_refused(assets):
    (assets.folder / "draft.mil").write_bytes(b"")
    with pytest.raises(FormatError, match=r"draft\.mil: empty"):
        pair_of(assets).checked()


def test_a_checkpoint_without_a_tensor_is_refused(assets):
    state = dict(assets.state)
    del state["layers.layer_1.feed_forward.norm.weight"]
    assets.write_state(state)
    with pytest.raises(FormatError, match=r"layer1\.feed_forward\.norm\.scale: missing"):
        pair_of(assets).checked()


def test_surplus_tensors_are_left_out_on_request(assets, tmp_path):
    assets.write_state({**assets.state, "layers.layer_0.attention.kv_quantizer.x": np.zeros(2, np.float32)})
    with pytest.raises(FormatError, match="the spec has no place for it"):
        pair_of(assets).checked()
    pair = pair_of(assets).checked(ignore_surplus=True)
    assert pair.surplus == ("layers.layer_0.attention.kv_quantizer.x",)
    pair.write(tmp_path)
    assert {file.name for file in tmp_path.glob("draft*")} == {"draft.mil", "draft_weights.bin"}


@pytest.mark.parametrize(("value", "says"), [(np.nan, "not numbers"), (np.inf, "infinite"), (1e6, "too large")])
def test_values_that_cannot_be_stored_leave_nothing_behind(value, says, assets, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    state = {name: values.copy() for name, values in assets.state.items()}
    state["output_norm.weight"][3] = value
    assets.write_state(state)
    with pytest.raises(FormatError, match=f"decoder.output_norm.scale: .*{says}"):
        pair_of(assets).checked().write(out)
    state["layers.layer_0.attention.norm.weight"][0] = value
    assets.write_state(state)
    with pytest.raises(FormatError, match="2 draft tensors cannot be stored"):
        pair_of(assets).checked().write(out)
    assert list(out.iterdir()) == []


def test_a_head_that_is_not_the_embedding_is_refused(made):
    tensors = {**read_torch(made.checkpoint)}
    tensors["output_transform.weight"] = LazyTensor.of(made.state["embedding.weight"] + 1)
    with pytest.raises(FormatError, match="the output head is not the embedding"):
        spec_tensors(tensors, heads=HEADS, kv_heads=KV_HEADS, where="x")


@pytest.mark.parametrize(("heads", "kv_heads"), [(5, 2), (64, 64)])
def test_heads_that_do_not_fit_are_refused(heads, kv_heads, made):
    with pytest.raises(FormatError, match="not a fused projection of these heads"):
        spec_tensors(read_torch(made.checkpoint), heads=heads, kv_heads=kv_heads, where="x")


# --- against coremltools


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_coremltools_reads_every_record(made, written):
    pytest.importorskip("coremltools", reason="the parity extra is not installed")
    from coremltools.libmilstoragepython import _BlobStorageReader

    reader = _BlobStorageReader(str(written / "draft_weights.bin"))
    read = {
        1: lambda at: np.asarray(reader.read_fp16_data(at)).view(np.float16),
        2: reader.read_float_data,
        3: reader.read_uint8_data,
        4: reader.read_int8_data,
        8: reader.read_int4_data,
        11: reader.read_uint4_data,
    }
    compared = 0
    blobs = {blob.metadata_offset: blob for blob in read_blobs(written / "draft_weights.bin")}
    for name, tensor in made.spec["weights_mapping"].items():
        ours = stored(written, made, name)
        for role, place in tensor["blobs"].items():
            theirs = np.asarray(read[blobs[place["offset"]].type_code](place["offset"]))
            np.testing.assert_array_equal(ours[role], theirs)
            compared += 1
    assert compared == len(made.records) - 3


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_coremltools_writes_the_same_file(made, written, tmp_path):
    """Its writer, given our values record by record, makes our file: packing and all."""
    pytest.importorskip("coremltools", reason="the parity extra is not installed")
    from coremltools.libmilstoragepython import _BlobStorageWriter

    values = {
        place["offset"]: stored(written, made, name)[role]
        for name, tensor in made.spec["weights_mapping"].items()
        for role, place in tensor["blobs"].items()
    }
    blobs = read_blobs(written / "draft_weights.bin")
    writer = _BlobStorageWriter(str(tmp_path / "theirs.bin"))
    for blob in blobs:
        array = values.get(blob.metadata_offset, blob.read())
        if blob.type_code == FP16:
            writer.write_fp16_data(array.view(np.uint16))
        elif blob.type_code == FP32:
            writer.write_float_data(array)
        elif blob.metadata_offset in values or blob.type_code != INT4:
            write = {3: "uint8", 4: "int8", 8: "int4", 11: "uint4", 14: "int32"}[blob.type_code]
            getattr(writer, f"write_{write}_data")(array.astype(np.uint8) if write == "uint4" else array)
    del writer  # it writes its header when it goes
    theirs = walk_blobs(np.fromfile(tmp_path / "theirs.bin", np.uint8), lambda rule, text: pytest.fail(text))
    ours = [blob for blob in blobs if blob.metadata_offset in values or blob.type_code != INT4]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.type_code, mine.nbytes, mine.padding_bits) == (other.type_code, other.nbytes, other.padding_bits)
        assert mine.read().tobytes() == other.read().tobytes()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_linear_values_are_coremltools(made):
    pytest.importorskip("coremltools", reason="the parity extra is not installed")
    from coremltools.optimize import _utils as theirs

    weights = np.random.default_rng(4).standard_normal((96, 64)).astype(np.float32)
    codes, scales, _ = theirs.compute_qparams(weights, 4, True, "LINEAR_SYMMETRIC", np.int8, [0, 1])
    ours = encode(weights, "linear_4bits", "x")
    np.testing.assert_array_equal(ours["scales"], scales.reshape(-1).astype(np.float16))
    np.testing.assert_array_equal(ours["values"], codes.astype(np.int8))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(48, 256), (64, 832)])
def test_palettes_are_coremltools(shape, monkeypatch):
    """Its palettisation with a scale a channel and 16 channels a group, made to use its exact k-means."""
    pytest.importorskip("coremltools", reason="the parity extra is not installed")
    from coremltools.optimize.coreml import _quantization_passes as passes

    exact = passes._get_kmeans_lookup_table_and_weight
    monkeypatch.setattr(
        passes,
        "_get_kmeans_lookup_table_and_weight",
        lambda bits, val, force_kmeans1d, **rest: exact(bits, val, force_kmeans1d=True),
    )
    weights = np.random.default_rng(6).standard_normal(shape).astype(np.float32)
    scales = np.abs(weights).max(axis=1, keepdims=True)
    made = passes.palettize_weights.blockwise_compress(weights / scales, "KMEANS", nbits=4, block_sizes=[16, 0])
    ours = encode(weights, "lut_4bits", "x")
    theirs = {"lut_indices": made.indices, "lut_palette": made.lut, "scales": scales}
    for role, values in theirs.items():
        values = np.asarray(values).reshape(-1)
        np.testing.assert_array_equal(ours[role].reshape(-1), values.astype(ours[role].dtype), err_msg=role)


def test_the_stand_in_is_a_draft_model():
    from mlx_afm.model import parse_toolkit_config

    model = parse_toolkit_config(CONFIG, where="x").model
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (HEADS, KV_HEADS, HEAD_WIDTH)
