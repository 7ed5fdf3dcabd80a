"""Quantization-aware training as a whole job: trained, resumed, scored, exported as exact codes."""

from __future__ import annotations

import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_afm
from mlx_afm import LoRAConfig, LoRAJob, TrainConfig
from mlx_afm.adapters import add_adapter, read_adapter
from mlx_afm.checkpoints.arrays import from_mlx, to_mlx
from mlx_afm.checkpoints.mlx_checkpoint import KEPT_FILES, write_config
from mlx_afm.errors import AdapterError, ConfigError
from mlx_afm.formats.mlx_folder import read_shards, write_shards
from mlx_afm.model_folder import ModelFolder
from mlx_afm.quant import QuantConfig
from mlx_afm.runs.start import start_adapter
from tiny import tiny_model

SIZES = {"vocab_size": 512, "hidden_dim": 64, "hidden_dim_scale_factor": 3}
TOKENS = mx.arange(3, 40)[None]
CONFIG = TrainConfig(iters=4, batch_size=4, learning_rate=2e-3, steps_per_eval=2, save_every=2)
QAT = LoRAConfig(fine_tune_type="qat")


@pytest.fixture(scope="module")
def dense(model_folder, tmp_path_factory):
    """A folder whose every width codes fill."""
    folder = tmp_path_factory.mktemp("qat") / "dense"
    folder.mkdir()
    model = tiny_model(**SIZES)
    write_shards(folder, {name: from_mlx(array) for name, array in tree_flatten(model.parameters())})
    for name in KEPT_FILES:
        shutil.copyfile(model_folder / name, folder / name)
    write_config(folder, model.args, {**ModelFolder(model_folder).kept_settings, "torch_dtype": "float32"})
    return folder


@pytest.fixture(scope="module")
def run(dense, data_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "a"
    job = LoRAJob(model=dense, data=data_folder, adapter_path=path, train=CONFIG, lora=QAT)
    return job, mlx_afm.train(job)


def live_model(dense, job):
    """The model as training left it: float weights, rounded in each pass."""
    model = ModelFolder(dense).load_model()
    add_adapter(model, job.lora)
    adapter = read_adapter(job.adapter_path)
    model.load_weights([(name, to_mlx(tensor)) for name, tensor in adapter.weights.items()], strict=False)
    model.eval()
    return model


def test_it_learns_and_every_way_to_it_has_the_loss_it_had(run, dense, data_folder, tmp_path):
    job, result = run
    valid = data_folder / "valid.jsonl"
    assert mlx_afm.score(dense, job.adapter_path / "best", valid).loss == pytest.approx(result.best_loss, rel=1e-5)
    plain = mlx_afm.convert(dense, tmp_path / "plain", quantization=QuantConfig(recipe="apple")).folder
    assert result.best_loss < mlx_afm.score(plain, None, valid).loss - 0.05
    done = mlx_afm.fuse(dense, job.adapter_path / "best", tmp_path / "codes")
    assert mlx_afm.score(done.folder, None, valid).loss == pytest.approx(result.best_loss, rel=1e-5)


def test_what_is_exported_are_exact_codes(run, dense, tmp_path):
    job, _ = run
    done = mlx_afm.fuse(dense, job.adapter_path, tmp_path / "codes")
    assert (done.form, done.difference) == ("trained codes", 0)
    assert done.effect > 0.1
    model, tokenizer = mlx_afm.load(done.folder)
    assert mx.abs(model(TOKENS) - live_model(dense, job)(TOKENS)).max().item() < 2e-4
    assert isinstance(mlx_afm.generate(model, tokenizer, "list", max_tokens=3), str)
    schemes = ModelFolder(done.folder).schemes
    assert {str(scheme) for path, scheme in schemes.items() if path != "model.embedding"} == {"balanced 2-bit"}
    assert str(schemes["model.embedding"]) == "affine 4-bit"
    apple = mlx_afm.convert(dense, tmp_path / "plain", quantization=QuantConfig(recipe="apple")).folder
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in read_shards(done.folder).items()}
    assert shapes == {name: (tensor.dtype, tensor.shape) for name, tensor in read_shards(apple).items()}
    again = mlx_afm.convert(done.folder, tmp_path / "dense", dequantize=True).folder
    back = mlx_afm.convert(again, tmp_path / "back", quantization=QuantConfig(bits=8))
    assert back.on_grid == len(schemes) - 1  # the embedding is on no balanced grid


def test_dense_again_if_that_is_asked_for(run, dense, tmp_path):
    job, _ = run
    done = mlx_afm.fuse(dense, job.adapter_path, tmp_path / "fused", dequantize=True)
    assert (done.form, ModelFolder(done.folder).schemes) == ("dense", {})
    assert done.difference < 2e-4


def test_before_any_step_it_is_what_convert_makes(dense, tmp_path):
    apple = mlx_afm.convert(dense, tmp_path / "plain", quantization=QuantConfig(recipe="apple")).folder
    model = ModelFolder(dense).load_model()
    add_adapter(model, QAT)
    assert mx.abs(model(TOKENS) - mlx_afm.load(apple)[0](TOKENS)).max().item() < 2e-4


def test_a_sixteen_bit_model_is_exported_in_its_dtype(dense, data_folder, tmp_path):
    folder = mlx_afm.convert(dense, tmp_path / "bf16", dtype="bfloat16").folder
    job = LoRAJob(model=folder, data=data_folder, adapter_path=tmp_path / "a", lora=QAT, train=replace(CONFIG, iters=2))
    mlx_afm.train(job)
    done = mlx_afm.fuse(folder, job.adapter_path, tmp_path / "codes")
    assert done.difference == 0
    tensors = read_shards(done.folder)
    assert tensors["model.output_norm.weight"].dtype == tensors["model.embedding.scales"].dtype == "bfloat16"
    live = live_model(folder, job)  # in float32
    wide = mlx_afm.convert(done.folder, tmp_path / "wide", dequantize=True, dtype="float32").folder
    assert mx.abs(mlx_afm.load(wide)[0](TOKENS) - live(TOKENS)).max().item() < 2e-4


def test_resumed_it_ends_the_same_to_the_last_bit(run, tmp_path):
    job, _ = run
    asked, again = [], replace(job, adapter_path=tmp_path / "again")
    assert mlx_afm.train(again, should_stop=lambda: asked.append(1) or len(asked) == 3).interrupted
    mlx_afm.train(replace(again, resume=True))
    for part in ("adapters.safetensors", "best/adapters.safetensors"):
        assert (again.adapter_path / part).read_bytes() == (job.adapter_path / part).read_bytes()


def test_some_projections_alone_leave_the_others_dense(dense, data_folder, tmp_path):
    form = LoRAConfig(fine_tune_type="qat", layers="reuse", targets=("up", "down"))
    job = LoRAJob(model=dense, data=data_folder, adapter_path=tmp_path / "a", lora=form, train=replace(CONFIG, iters=1))
    mlx_afm.train(job)
    done = mlx_afm.fuse(dense, job.adapter_path, tmp_path / "codes")
    mlps = {f"model.kv_reuse_layers.{n}.mlp.{name}_proj" for n in (0, 1) for name in ("up", "down")}
    assert set(ModelFolder(done.folder).schemes) == {"model.embedding", *mlps}
    assert done.difference == 0


def test_scales_do_not_decay(dense, data_folder, tmp_path):
    """With a rate that decay alone could see: weights shrink, scales do not."""
    config = replace(CONFIG, iters=1, learning_rate=1e-6, weight_decay=1e5, schedule="constant", warmup=0)
    job = LoRAJob(model=dense, data=data_folder, adapter_path=tmp_path / "a", lora=QAT, train=config)
    mlx_afm.train(job)
    path, model = "model.layers.0.mlp.up_proj", ModelFolder(dense).load_model()
    add_adapter(model, QAT)
    before, after = dict(tree_flatten(model.parameters())), read_adapter(job.adapter_path).weights
    assert np.abs(after[f"{path}.weight"].read_values()).sum() < 0.95 * mx.abs(before[f"{path}.weight"]).sum().item()
    assert np.abs(after[f"{path}.scales"].read_values() - np.array(before[f"{path}.scales"])).max() < 1e-5


def test_a_new_run_starts_from_its_values_but_not_from_a_part_of_them(run, dense):
    job, _ = run
    model = ModelFolder(dense).load_model()
    start_adapter(model, ModelFolder(dense), QAT, seed=0, adapter_file=job.adapter_path)
    stored = read_adapter(job.adapter_path).weights
    for name, array in tree_flatten(model.trainable_parameters()):
        assert np.array_equal(np.array(array), stored[name].read_values()), name
    less = LoRAConfig(fine_tune_type="qat", layers="0")
    with pytest.raises(AdapterError, match=r"changes more than would be trained"):
        start_adapter(ModelFolder(dense).load_model(), ModelFolder(dense), less, seed=0, adapter_file=job.adapter_path)
    with pytest.raises(ConfigError, match=r"another form .*expected qat.*--fine-tune-type qat"):
        start_adapter(
            ModelFolder(dense).load_model(), ModelFolder(dense), LoRAConfig(), seed=0, adapter_file=job.adapter_path
        )


def test_codes_are_refused_as_a_start_and_the_toolkits_forms_as_an_end(run, dense, data_folder, tmp_path):
    job, _ = run
    codes = mlx_afm.convert(dense, tmp_path / "codes", quantization=QuantConfig(bits=4)).folder
    with pytest.raises(AdapterError, match=r"quantization-aware training of a quantized model"):
        mlx_afm.train(replace(job, model=codes, adapter_path=tmp_path / "b"))
    with pytest.raises(AdapterError, match=r"of a quantized model.*convert -d"):
        mlx_afm.load(codes, job.adapter_path)
    with pytest.raises(AdapterError, match=r"low-rank updates, not weights \(expected lora, found qat\)"):
        mlx_afm.convert_adapter(job.adapter_path, tmp_path / "x.pt")
