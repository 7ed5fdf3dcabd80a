"""Every kind of codes through the whole line: convert, load, generate, train on, save, load back, fuse."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_afm
import tolerances
from mlx_afm import LoRAConfig, LoRAJob, TrainConfig
from mlx_afm.checkpoints.arrays import from_mlx
from mlx_afm.checkpoints.mlx_checkpoint import KEPT_FILES, write_config
from mlx_afm.checkpoints.quantized import row_blocks
from mlx_afm.errors import AdapterError, ConfigError, TensorsError
from mlx_afm.formats.mlx_folder import read_shards, write_shards
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.model_folder import ModelFolder
from mlx_afm.quant import QuantConfig, Scheme, dequantize_balanced, unpack_codes
from tiny import tiny_model

FORMS = {
    **{f"affine-{bits}": {"bits": bits, "group_size": 32} for bits in (2, 3, 4, 5, 6, 8)},
    **{mode: {"mode": mode} for mode in ("balanced", "mxfp4", "nvfp4", "mxfp8")},
    "apple": {"recipe": "apple"},
    "mixed": {"recipe": "mixed_3_6"},
}
SIZES = {"vocab_size": 512, "hidden_dim": 64, "hidden_dim_scale_factor": 3}
TOKENS = mx.arange(3, 40)[None]
CONFIG = TrainConfig(iters=2, batch_size=2, learning_rate=2e-3, steps_per_eval=2, save_every=2)


def write_model(folder, model, like):
    """A model folder of any weights with the tokenizer of another."""
    folder.mkdir(parents=True)
    write_shards(folder, {name: from_mlx(array) for name, array in tree_flatten(model.parameters())})
    for name in KEPT_FILES:
        shutil.copyfile(like / name, folder / name)
    write_config(folder, model.args, {**ModelFolder(like).kept_settings, "torch_dtype": "float32"})
    return folder


@pytest.fixture(scope="module")
def dense_folder(model_folder, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("wide") / "dense", tiny_model(**SIZES), model_folder)


def weights_on_grid(model, dtype=mx.float32):
    """Puts every matrix of a model on a balanced grid."""
    rng, changed = np.random.default_rng(0), []
    for name, array in tree_flatten(model.parameters()):
        if array.ndim == 2:
            scales = mx.array(rng.uniform(0.1, 0.3, (array.shape[0], 1)).astype(np.float32)).astype(dtype)
            codes = mx.array(rng.integers(0, 4, array.shape).astype(np.float32) - 1.5)
            changed.append((name, (codes * scales.astype(mx.float32)).astype(dtype)))
        else:
            changed.append((name, array if name.endswith("_scale") else array.astype(dtype)))
    model.load_weights(changed)
    return model


def bits_of(tensors):
    return {name: (t.dtype, t.shape, np.ascontiguousarray(t.read_stored()).tobytes()) for name, t in tensors.items()}


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_line(form, dense_folder, data_folder, tmp_path):
    folder = tmp_path / "codes"
    done = mlx_afm.convert(dense_folder, folder, quantization=QuantConfig(**FORMS[form]), verify=True)
    schemes = ModelFolder(folder).schemes
    assert sum(done.quantized.values()) == len(schemes) == len(matrices_of(dense_folder))
    assert done.left_dense == ()
    model, tokenizer = mlx_afm.load(folder)
    assert isinstance(mlx_afm.generate(model, tokenizer, "list", max_tokens=4), str)

    job = LoRAJob(model=folder, data=data_folder, adapter_path=tmp_path / "run", train=CONFIG, lora=LoRAConfig(rank=4))
    result = mlx_afm.train(job)
    score = mlx_afm.score(folder, job.adapter_path / "best", data_folder / "valid.jsonl")
    assert score.loss == pytest.approx(result.best_loss, rel=1e-5)
    assert score.loss < mlx_afm.score(folder, None, data_folder / "valid.jsonl").loss
    live, _ = mlx_afm.load(folder, job.adapter_path)

    kept = mlx_afm.fuse(folder, job.adapter_path, tmp_path / "kept")
    assert (kept.form, kept.difference) == ("codes", 0)
    assert kept.effect > 1e-3
    assert bits_of(read_shards(kept.folder)) == bits_of(read_shards(folder))
    again, _ = mlx_afm.load(kept.folder)
    assert mx.array_equal(again(TOKENS), live(TOKENS))

    dense = mlx_afm.fuse(folder, job.adapter_path, tmp_path / "fused", dequantize=True)
    assert dense.form == "dense"
    assert dense.difference <= tolerances.LOGITS_QUANTIZED
    assert dense.effect == kept.effect
    fused, _ = mlx_afm.load(dense.folder)
    assert mx.abs(fused(TOKENS) - live(TOKENS)).max().item() <= tolerances.LOGITS_QUANTIZED
    assert not ModelFolder(dense.folder).schemes


def matrices_of(folder):
    return [name for name, tensor in read_shards(folder).items() if len(tensor.shape) == 2]


@pytest.mark.parametrize("form", FORMS)
def test_dense_again_it_is_the_model_that_was_quantized(form, dense_folder, tmp_path):
    mlx_afm.convert(dense_folder, tmp_path / "codes", quantization=QuantConfig(**FORMS[form]))
    done = mlx_afm.convert(tmp_path / "codes", tmp_path / "dense", dequantize=True, verify=True)
    assert (done.quantized, done.bits_per_weight) == ({}, 32)
    codes, dense = mlx_afm.load(tmp_path / "codes")[0], mlx_afm.load(tmp_path / "dense")[0]
    assert mx.abs(codes(TOKENS) - dense(TOKENS)).max().item() <= tolerances.LOGITS_QUANTIZED
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"quantization", "model_file"} & set(config)
    before, after = bits_of(read_shards(dense_folder)), bits_of(read_shards(tmp_path / "dense"))
    assert {name for name in before if before[name] != after[name]} == set(matrices_of(dense_folder))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_weights_on_the_grid_survive_any_form_bit_for_bit(form, dtype, model_folder, tmp_path):
    """Never a second rounding: packed as they are, whatever was asked for."""
    source = write_model(tmp_path / "source", weights_on_grid(tiny_model(**SIZES), dtype), model_folder)
    done = mlx_afm.convert(source, tmp_path / "codes", quantization=QuantConfig(**FORMS[form]))
    assert done.quantized == {"balanced 2-bit": done.on_grid}
    assert done.on_grid == len(matrices_of(source))
    mlx_afm.convert(tmp_path / "codes", tmp_path / "dense", dequantize=True)
    assert bits_of(read_shards(tmp_path / "dense")) == bits_of(read_shards(source))
    path = "model.layers.0.mlp.up_proj"
    codes, wanted = read_shards(tmp_path / "codes"), next(row_blocks(read_shards(source)[f"{path}.weight"]))
    values = unpack_codes(codes[f"{path}.weight"].read_values()), codes[f"{path}.scales"].read_values()
    assert dequantize_balanced(*values, str(dtype).removeprefix("mlx.core.")).tobytes() == wanted.tobytes()


def test_from_the_toolkit_and_from_a_folder_it_is_the_same(toolkit_folder, model_folder, tmp_path):
    config = QuantConfig(bits=4)
    mlx_afm.convert(toolkit_folder, tmp_path / "a", quantization=config)
    mlx_afm.convert(model_folder, tmp_path / "b", quantization=config)
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file()} == files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_a_zero_base_adapter_is_left_out_and_an_active_one_kept(model_folder, adapter_forms, tmp_path, copy_of):
    mlx_afm.convert(model_folder, tmp_path / "a", quantization=QuantConfig(bits=4))
    assert not (tmp_path / "a" / "base_adapter").exists()
    source = copy_of(model_folder)
    shutil.rmtree(source / "base_adapter")
    shutil.copytree(adapter_forms["folder"], source / "base_adapter")
    done = mlx_afm.convert(source, tmp_path / "b", quantization=QuantConfig(bits=4))
    assert done.base_adapter == "active"
    plain, adapted = mlx_afm.load(tmp_path / "a")[0], mlx_afm.load(tmp_path / "b")[0]
    assert not mx.allclose(plain(TOKENS), adapted(TOKENS), atol=1e-2)
    with pytest.raises(AdapterError, match="stays beside its codes"):
        mlx_afm.fuse(tmp_path / "b", None, tmp_path / "c")
    dense = mlx_afm.fuse(tmp_path / "b", None, tmp_path / "c", dequantize=True)
    assert mx.abs(mlx_afm.load(dense.folder)[0](TOKENS) - adapted(TOKENS)).max().item() <= tolerances.LOGITS_QUANTIZED


@pytest.mark.parametrize("form", ["affine-4", "apple", "nvfp4"])
def test_16_bits_are_computed_in_16_bits_and_cast_without_touching_codes(form, dense_folder, tmp_path):
    config = QuantConfig(**FORMS[form])
    mlx_afm.convert(dense_folder, tmp_path / "codes", dtype="bfloat16", quantization=config)
    model, _ = mlx_afm.load(tmp_path / "codes")
    assert model(TOKENS).dtype == mx.bfloat16
    mlx_afm.convert(tmp_path / "codes", tmp_path / "wide", dtype="float32")
    assert mlx_afm.load(tmp_path / "wide")[0](TOKENS).dtype == mx.float32
    before, after = read_shards(tmp_path / "codes"), read_shards(tmp_path / "wide")
    paths = set(ModelFolder(tmp_path / "codes").schemes)
    assert paths == set(ModelFolder(tmp_path / "wide").schemes)
    inside = [name for name in before if name.rpartition(".")[0] in paths]
    assert bits_of({n: before[n] for n in inside}) == bits_of({n: after[n] for n in inside})


def test_column_weights_are_used(dense_folder, tmp_path):
    path, rng = "model.layers.1.mlp.down_proj", np.random.default_rng(0)
    scales = []
    for number, weights in enumerate(({}, {path: rng.uniform(0, 1, 192) ** 4})):
        config = QuantConfig(mode="balanced", column_weights=weights)
        mlx_afm.convert(dense_folder, tmp_path / str(number), quantization=config)
        scales.append(
            {n: t.read_values() for n, t in read_shards(tmp_path / str(number)).items() if n.endswith("scales")}
        )
    moved = {name for name in scales[0] if not np.array_equal(scales[0][name], scales[1][name])}
    assert moved == {f"{path}.scales"}
    config = QuantConfig(column_weights={"model.nothing": np.ones(64)})
    with pytest.raises(ConfigError, match="does not have"):
        mlx_afm.convert(dense_folder, tmp_path / "x", quantization=config)


def test_a_predicate_leaves_matrices_dense(dense_folder, tmp_path):
    def predicate(path, shape):
        return Scheme(mode="mxfp8") if path.endswith("qkv_proj") else not path.endswith("embedding")

    mlx_afm.convert(dense_folder, tmp_path / "q", quantization=QuantConfig(bits=4, predicate=predicate))
    schemes = ModelFolder(tmp_path / "q").schemes
    assert "model.embedding" not in schemes
    assert schemes["model.layers.0.self_attn.qkv_proj"].mode == "mxfp8"
    told = json.loads((tmp_path / "q" / "config.json").read_text())["quantization"]
    assert {name for name in told if name.startswith("model.")} == {
        f"model.layers.{number}.self_attn.qkv_proj" for number in range(3)
    }
    assert mlx_afm.load(tmp_path / "q")[0](TOKENS).shape == (1, 37, 512)


def test_inspect_counts_what_codes_stand_for(dense_folder, tmp_path):
    done = mlx_afm.convert(dense_folder, tmp_path / "q", quantization=QuantConfig(recipe="apple"))
    dense, codes = mlx_afm.inspect(dense_folder), mlx_afm.inspect(tmp_path / "q")
    assert codes["parameters"] == dense["parameters"]
    assert codes["quantization"] == done.quantized
    assert codes["bits_per_weight"] == done.bits_per_weight < 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"quantization": QuantConfig(bits=8)}, "quantized already"),
        ({"to": "torch"}, "convert -d"),
        ({"to": "torch", "dequantize": True}, "no codes"),
        ({"quantization": QuantConfig(), "dequantize": True}, "either quantize or dequantize"),
    ],
)
def test_what_cannot_be_done_with_codes_is_refused(arguments, says, dense_folder, tmp_path):
    mlx_afm.convert(dense_folder, tmp_path / "q", quantization=QuantConfig(bits=4))
    with pytest.raises(ConfigError, match=says):
        mlx_afm.convert(tmp_path / "q", tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_a_dense_folder_cannot_be_dequantized(dense_folder, tmp_path):
    with pytest.raises(ConfigError, match="nothing to dequantize"):
        mlx_afm.convert(dense_folder, tmp_path / "x", dequantize=True)


def test_weights_that_are_not_finite_are_named(model_folder, tmp_path):
    model = tiny_model(**SIZES)
    up = model.model.layers[0].mlp.up_proj
    up.weight = mx.where(mx.arange(64) == 5, mx.array(float("nan")), up.weight)
    source = write_model(tmp_path / "source", model, model_folder)
    with pytest.raises(TensorsError, match=r"not finite[^\n]*\n +model\.layers\.0\.mlp\.up_proj\.weight: 192 of"):
        mlx_afm.convert(source, tmp_path / "x", quantization=QuantConfig(bits=4))


@pytest.mark.parametrize("change", [{"quantization": None}, {"quantization": {"bits": 99, "group_size": 64}}])
def test_codes_that_config_json_does_not_explain_are_refused(change, dense_folder, tmp_path, edit_json):
    mlx_afm.convert(dense_folder, tmp_path / "q", quantization=QuantConfig(bits=4))
    edit_json(tmp_path / "q" / "config.json", **change)
    with pytest.raises(ConfigError, match="quantization"):
        mlx_afm.load(tmp_path / "q")


def test_full_fine_tuning_of_codes_is_refused(dense_folder, data_folder, tmp_path):
    mlx_afm.convert(dense_folder, tmp_path / "q", quantization=QuantConfig(bits=4))
    job = LoRAJob(
        model=tmp_path / "q", data=data_folder, adapter_path=tmp_path / "run", train=CONFIG,
        lora=LoRAConfig(fine_tune_type="full"),
    )  # fmt: skip
    with pytest.raises(AdapterError, match="full fine-tuning"):
        mlx_afm.train(job)


def test_rows_come_in_blocks_whatever_the_source(monkeypatch):
    values = np.arange(70 * 16, dtype=np.float32).reshape(70, 16)
    monkeypatch.setattr("mlx_afm.checkpoints.quantized.BLOCK_BYTES", 4 * 16 * 8)
    plain = LazyTensor.of(values)
    computed = LazyTensor(
        "float32", (70, 16), lambda: values, lambda: iter(np.split(values.reshape(-1), [37, 500, 501]))
    )
    for blocks in (row_blocks(plain), row_blocks(plain, first_rows=3), row_blocks(computed)):
        np.testing.assert_array_equal(np.concatenate(list(blocks)), values)
    assert [len(block) for block in row_blocks(plain, first_rows=3)][:2] == [3, 8]
