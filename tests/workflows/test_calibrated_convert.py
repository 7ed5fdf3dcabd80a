"""What a model reads decides its scales, and what rounding loses starts an adapter: convert -q with either."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_afm
from mlx_afm import LoRAConfig
from mlx_afm.adapters import adapter_shapes, add_adapter, set_adapter_weights
from mlx_afm.data import DataConfig, read_tokens
from mlx_afm.errors import ConfigError
from mlx_afm.model_folder import ModelFolder
from mlx_afm.quant import QuantConfig, quantize_balanced
from mlx_afm.quant.residual import InitConfig
from mlx_afm.workflows.calibrate import Calibration, column_weights
from mlx_afm.workflows.convert import convert
from mlx_afm.workflows.fuse import fuse
from tiny import random_tokens, tiny_model

APPLE = QuantConfig(recipe="apple")
TOKENS = mx.arange(3, 40)[None]


def inputs_of_up(model, tokens):
    """What the first layer's up projection reads, by hand."""
    layer = model.model.layers[0]
    from mlx_afm.model.attention_context import full_context

    x = model.model.embedding(tokens)
    context = full_context(
        model.args, x.dtype, tokens.shape[1], positions_BL=None, documents_BL=None, subtree_end_BL=None, cache=None
    )
    attended, _, _ = layer.self_attn(x, layer.input_layernorm, context, None, None)
    return layer.input_layernorm(x), layer.post_attention_layernorm(attended)


def test_the_weights_are_the_mean_squares_of_the_inputs(model_folder, data_folder):
    model = ModelFolder(model_folder).load_model()
    examples = list(read_tokens((data_folder / "train.jsonl",), model_folder / "tokenizer.model"))[:5]
    before = [path for path, _ in model.named_modules()]
    found = column_weights(model, examples)
    assert [path for path, _ in model.named_modules()] == before
    pairs = [inputs_of_up(model, mx.array(example.ids)[None]) for example in examples]
    for path, index in (("self_attn.qkv_proj", 0), ("mlp.gate_proj", 1), ("mlp.up_proj", 1)):
        rows = np.concatenate([np.array(pair[index][0], np.float64) for pair in pairs])
        np.testing.assert_allclose(found[f"model.layers.0.{path}"], np.mean(rows**2, axis=0), rtol=1e-4)
    matrices = {n.removesuffix(".weight") for n, a in tree_flatten(model.parameters()) if a.ndim == 2}
    assert set(found) == matrices - {"model.embedding"}
    assert all(np.isfinite(weights).all() and (weights > 0).any() for weights in found.values())


def test_a_projection_that_reads_only_zeros_is_left_out():
    model = tiny_model()
    layer = model.model.layers[2]
    layer.post_attention_layernorm.weight = mx.zeros_like(layer.post_attention_layernorm.weight)

    class Example:
        ids = np.array(random_tokens((7,)))

        def __len__(self):
            return 7

    found = column_weights(model, [Example()])
    assert {f"model.layers.2.mlp.{name}_proj" for name in ("gate", "up", "down")}.isdisjoint(found)
    assert "model.layers.1.mlp.up_proj" in found


def output_error(folder, dense, inputs, path):
    weights = [dict(mlx_afm.load(f)[0].named_modules())[path] for f in (dense, folder)]
    return mx.square(inputs @ weights[0].weight.T - inputs @ weights[1].dense_weight().T).sum().item()


def test_scales_are_fitted_to_what_is_read(model_folder, toolkit_folder, data_folder, tmp_path):
    """The outputs of a projection err less on those examples; from either form of the model it is the same folder."""
    calibration = Calibration(data=data_folder, examples=20)
    plain = convert(model_folder, tmp_path / "plain", quantization=APPLE).folder
    done = convert(model_folder, tmp_path / "fitted", quantization=APPLE, calibration=calibration, verify=True).folder
    same = convert(toolkit_folder, tmp_path / "same", quantization=APPLE, calibration=calibration).folder
    for file in done.glob("*.safetensors"):
        assert file.read_bytes() == (same / file.name).read_bytes()
    model, path = ModelFolder(model_folder).load_model(), "model.layers.0.mlp.up_proj"
    rows = list(read_tokens((data_folder / "train.jsonl",), model_folder / "tokenizer.model"))
    inputs = mx.concatenate([inputs_of_up(model, mx.array(row.ids)[None])[1][0] for row in rows])
    weight = np.array(dict(model.named_modules())[path].weight)
    wanted = quantize_balanced(weight, column_weights_N=column_weights(model, rows)[path]).scales_O
    found = dict(mlx_afm.load(done)[0].named_modules())[path]
    np.testing.assert_allclose(np.array(found.scales), wanted, rtol=1e-6)
    # Scales of least error by column; that is the outputs' error only as far as columns do not go together.
    assert output_error(done, model_folder, inputs, path) < 1.02 * output_error(plain, model_folder, inputs, path)
    assert not mx.array_equal(found.scales, dict(mlx_afm.load(plain)[0].named_modules())[path].scales)


def test_examples_are_spread_over_the_file(model_folder, data_folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("mlx_afm.workflows.calibrate.column_weights", lambda model, rows: seen.extend(rows) or {})
    convert(model_folder, tmp_path / "q", quantization=APPLE, calibration=Calibration(data=data_folder, examples=3))
    assert [row.where.rpartition(" ")[2] for row in seen] == ["1", "11", "20"]


@pytest.mark.parametrize(
    ("init", "form"),
    [("residual-svd", {"recipe": "apple"}), ("weight-svd", {"bits": 4}), ("residual-svd", {"mode": "mxfp4"})],
    ids=str,
)
def test_codes_and_adapter_come_nearer_to_the_weights(init, form, model_folder, tmp_path):
    config = InitConfig(init=init, rank=8, rounds=2)
    done = convert(model_folder, tmp_path / "q", quantization=QuantConfig(**form), init_adapter=config, verify=True)
    assert done.base_adapter == "active"
    adapter = ModelFolder(done.folder).base_adapter
    assert adapter.config == LoRAConfig(rank=8)
    assert {n: t.shape for n, t in adapter.weights.items()} == adapter_shapes(
        ModelFolder(model_folder).config, adapter.config
    )
    merged = fuse(done.folder, None, tmp_path / "merged", dequantize=True).folder
    wide = dict(tree_flatten(ModelFolder(merged).load_model().parameters()))
    plain = convert(model_folder, tmp_path / "plain", quantization=QuantConfig(**form)).folder
    apart = dict(
        tree_flatten(ModelFolder(convert(plain, tmp_path / "d", dequantize=True).folder).load_model().parameters())
    )
    dense = dict(tree_flatten(ModelFolder(model_folder).load_model().parameters()))
    for path in ModelFolder(done.folder).schemes:
        if path != "model.embedding":
            name = f"{path}.weight"
            after, before = (mx.square(weights[name] - dense[name]).sum().item() for weights in (wide, apart))
            assert after < 0.9 * before, name
    kind = "up_proj"
    names = [name for name in dense if name.endswith(f"{kind}.weight")]
    shares = [mx.square(wide[n] - dense[n]).sum().item() / mx.square(dense[n]).sum().item() for n in names]
    assert done.init_errors[kind][1] == pytest.approx(np.mean(shares), rel=0.02, abs=2e-5)


def test_it_is_active_and_adapters_start_from_it(model_folder, data_folder, tmp_path):
    done = convert(model_folder, tmp_path / "q", quantization=APPLE, init_adapter=InitConfig(rank=4, scale=2.0))
    model = ModelFolder(done.folder).load_model()
    add_adapter(model, LoRAConfig(rank=4, scale=2.0))
    weights = {
        name: mx.array(tensor.read_values()) for name, tensor in ModelFolder(done.folder).base_adapter.weights.items()
    }
    set_adapter_weights(model, weights, where="test")
    assert mx.array_equal(model(TOKENS), mlx_afm.load(done.folder)[0](TOKENS))
    assert not (done.folder / "toolkit" / "base-model-config.json").exists(), "it names another adapter"


def test_in_sixteen_bits(model_folder, tmp_path):
    done = convert(
        model_folder, tmp_path / "q", dtype="bfloat16", quantization=QuantConfig(bits=4),
        init_adapter=InitConfig(init="weight-svd", rank=4),
    )  # fmt: skip
    assert json.loads((done.folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    arrays = dict(tree_flatten(ModelFolder(done.folder).load_model().parameters()))
    assert arrays["model.layers.0.mlp.up_proj.scales"].dtype == mx.bfloat16
    assert {t.dtype for t in ModelFolder(done.folder).base_adapter.weights.values()} == {"float32"}
    assert mlx_afm.load(done.folder)[0](TOKENS).dtype == mx.bfloat16


def test_calibrated_directions_are_others(model_folder, data_folder, tmp_path):
    folders = [
        convert(
            model_folder, tmp_path / name, quantization=QuantConfig(bits=4), init_adapter=InitConfig(rank=4), **more
        )
        for name, more in (("plain", {}), ("seen", {"calibration": Calibration(data=data_folder, examples=8)}))
    ]
    arrays = [
        ModelFolder(done.folder).base_adapter.weights["model.layers.0.mlp.up_proj.lora_a"].read_values()
        for done in folders
    ]
    assert not np.allclose(*arrays, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"quantization": QuantConfig(bits=4)}, r"changes nothing here.*--q-recipe apple"),
        ({}, "belong to quantizing"),
        ({"dequantize": True}, "belong to quantizing"),
    ],
)
def test_calibration_that_would_do_nothing_is_refused(arguments, says, model_folder, data_folder, tmp_path):
    with pytest.raises(ConfigError, match=says):
        convert(model_folder, tmp_path / "q", calibration=Calibration(data=data_folder), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_else_is_refused(model_folder, adapter_forms, data_folder, tmp_path, copy_of):
    with pytest.raises(ConfigError, match="at least 1"):
        Calibration(data=data_folder, examples=0)
    bare = copy_of(model_folder, "bare")
    (bare / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"without a tokenizer"):
        convert(
            bare,
            tmp_path / "q",
            quantization=APPLE,
            calibration=Calibration(data=data_folder, data_config=DataConfig()),
        )
    active = copy_of(model_folder, "active")
    shutil.rmtree(active / "base_adapter", ignore_errors=True)
    shutil.copytree(adapter_forms["folder"], active / "base_adapter")
    with pytest.raises(ConfigError, match=r"active adapter already.*--init-adapter"):
        convert(active, tmp_path / "q", quantization=APPLE, init_adapter=InitConfig())
    codes = convert(model_folder, tmp_path / "codes", quantization=APPLE).folder
    dense = convert(codes, tmp_path / "dense", dequantize=True).folder
    wide = QuantConfig(predicate=lambda path, shape: path.endswith("up_proj"), bits=4)
    with pytest.raises(ConfigError, match=r"every matrix lies on the grid.*--init-adapter"):
        convert(dense, tmp_path / "q", quantization=wide, init_adapter=InitConfig())
    assert not (tmp_path / "q").exists()
