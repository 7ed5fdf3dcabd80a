"""No adapter module stays at zero for ever: pairs with A = 0 and B = 0 start anew; what has no gradient is named."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_afm.adapters import LoRAConfig, adapter_shapes, write_adapter_folder
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.model_folder import ModelFolder
from tiny import random_adapter

NOTICE = (
    "have rank components in which A and B are both zero, so they could not learn: A starts with random values there"
)


def train(cli, model, data, out, *options):
    ran = cli("lora", "--train", "--model", model, "--data", data, "--adapter-path", out, "--iters", 4, *options)
    assert ran.code == 0, ran.err
    return ran.err, {n: np.array(a) for n, a in mx.load(str(out / "adapters.safetensors")).items()}


def never_trained(arrays):
    return [name for name, array in arrays.items() if not array.any()]


@pytest.fixture(scope="module")
def quantized_folder(model_folder, tmp_path_factory):
    """Balanced codes with a start value: the down projections stay dense, so their pairs are zero."""
    import mlx_afm
    from mlx_afm.quant import QuantConfig
    from mlx_afm.quant.residual import InitConfig

    target = tmp_path_factory.mktemp("q") / "q"
    options = {"quantization": QuantConfig(mode="balanced"), "init_adapter": InitConfig(rank=8)}
    return mlx_afm.convert(model_folder, target, **options).folder


def test_after_residual_svd_every_module_learns(quantized_folder, data_folder, tmp_path, cli):
    err, arrays = train(cli, quantized_folder, data_folder, tmp_path / "run", "--rank", 8)
    assert f"6 of 38 trained adapter modules {NOTICE} (seed 0)" in err
    assert not never_trained(arrays)
    again, same = train(cli, quantized_folder, data_folder, tmp_path / "again", "--rank", 8)
    assert all(np.array_equal(arrays[name], same[name]) for name in arrays), "the seed decides"
    assert "exactly zero" not in err + again


def test_what_is_not_trained_keeps_its_zeros_and_is_not_mentioned(quantized_folder, data_folder, tmp_path, cli):
    err, arrays = train(cli, quantized_folder, data_folder, tmp_path / "run", "--rank", 8, "--targets", "q,v")
    assert NOTICE not in err
    assert all("down_proj" in name for name in never_trained(arrays))
    assert len(never_trained(arrays)) == 12


@pytest.mark.parametrize("form", ["folder", "fmadapter", "pt"])
def test_from_an_adapter_of_zeros_every_module_learns(form, model_folder, data_folder, tmp_path, cli):
    """An adapter on q alone, exported or converted with --zero-untrained, then training of all projections."""
    base, config = ModelFolder(model_folder).config, LoRAConfig(rank=4, targets=("q",))
    write_adapter_folder(tmp_path / "small", random_adapter(base, config))
    if form == "fmadapter":
        start = tmp_path / "out" / "box.fmadapter"
        ran = cli("export", "--adapter-path", tmp_path / "small", "--name", "box", "--output-dir", tmp_path / "out",
                  "--zero-untrained")  # fmt: skip
    else:
        start = tmp_path / ("start.pt" if form == "pt" else "start")
        ran = cli("adapter", "convert", tmp_path / "small", tmp_path / "start.pt", "--zero-untrained")
        if form == "folder":
            ran = cli("adapter", "convert", tmp_path / "start.pt", start, "--model", model_folder)
    assert ran.code == 0, ran.err
    err, arrays = train(cli, model_folder, data_folder, tmp_path / "run", "--resume-adapter-file", start)
    # 32 modules are zero; in the 6 others 28 of 32 components of the rank are.
    assert f"38 of 38 trained adapter modules {NOTICE} (seed 0)" in err
    assert not never_trained(arrays)
    components = [np.any(array, axis=0 if name.endswith("lora_a") else 1) for name, array in arrays.items()]
    assert all(component.all() for component in components), "every component of the rank"


def test_zeros_in_dora_start_anew_too(model_folder, data_folder, tmp_path, cli):
    base, config = ModelFolder(model_folder).config, LoRAConfig(rank=4, fine_tune_type="dora")
    adapter = random_adapter(base, config)
    zero = {
        n: LazyTensor.of(np.zeros(s, np.float32)) for n, s in adapter_shapes(base, config).items() if n[-2:] != ".m"
    }
    write_adapter_folder(tmp_path / "start", type(adapter)(config, base, {**adapter.weights, **zero}))
    options = ("--fine-tune-type", "dora", "--rank", 4, "--resume-adapter-file", tmp_path / "start")
    err, arrays = train(cli, model_folder, data_folder, tmp_path / "run", *options)
    assert NOTICE in err
    assert not never_trained(arrays)


def test_tensors_without_a_gradient_are_named(model_folder, data_folder, copy_of, tmp_path, cli):
    """A norm of zeros in layer 0: nothing reaches its q, k, v and o."""
    folder = copy_of(model_folder, "broken")
    file = folder / "model.safetensors"
    arrays = mx.load(str(file))
    name = "model.layers.0.input_layernorm.weight"
    mx.save_safetensors(str(file), {**arrays, name: mx.zeros_like(arrays[name])}, {"format": "mlx"})
    err, _ = train(cli, folder, data_folder, tmp_path / "run")
    assert "step 3  warning: the gradient of 8 of 76 trained tensors is exactly zero, so they do not learn: " in err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (found,) = [line for line in lines if line["event"] == "zero_gradients"]
    attention = "model.layers.0.self_attn."
    modules = [*(f"{attention}qkv_proj.{part}" for part in "qkv"), f"{attention}out_proj"]
    assert sorted(found["names"]) == sorted(f"{module}.lora_{side}" for module in modules for side in "ab")
    err, _ = train(cli, model_folder, data_folder, tmp_path / "sound")
    assert "exactly zero" not in err
