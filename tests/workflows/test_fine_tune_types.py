"""Kinds of fine-tuning as whole jobs: DoRA, full, and training that starts from another adapter."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_afm
import tolerances
from mlx_afm import LoRAConfig, LoRAJob, TrainConfig
from mlx_afm.adapters import adapter_shapes, read_adapter
from mlx_afm.errors import AdapterError, ConfigError
from mlx_afm.model_folder import ModelFolder
from mlx_afm.runs.start import start_adapter
from mlx_afm.workflows.convert import convert

CONFIG = TrainConfig(iters=4, batch_size=4, learning_rate=2e-3, steps_per_eval=2, save_every=2)
TOKENS = mx.arange(3, 40)[None]


def trained(model_folder, data_folder, path, **form):
    job = LoRAJob(model=model_folder, data=data_folder, adapter_path=path, train=CONFIG, lora=LoRAConfig(**form))
    return job, mlx_afm.train(job)


@pytest.fixture(scope="module", params=["dora", "full"])
def run(request, model_folder, data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    form = {"rank": 4} if request.param == "dora" else {}
    return trained(model_folder, data_folder, folder, fine_tune_type=request.param, **form)


def test_it_learns_and_loads_back_with_the_loss_it_had(run, model_folder, data_folder):
    job, result = run
    valid = mlx_afm.score(model_folder, job.adapter_path / "best", data_folder / "valid.jsonl")
    assert valid.loss == pytest.approx(result.best_loss, rel=1e-5)
    assert valid.loss < mlx_afm.score(model_folder, None, data_folder / "valid.jsonl").loss - 0.01
    settings = json.loads((job.adapter_path / "adapter_config.json").read_text())
    assert settings["fine_tune_type"] == job.lora.fine_tune_type
    adapter = read_adapter(job.adapter_path, ModelFolder(model_folder).config)
    assert {name: t.shape for name, t in adapter.weights.items()} == adapter_shapes(adapter.base, adapter.config)
    assert {tensor.dtype for tensor in adapter.weights.values()} == {"float32"}


def test_fused_and_generated(run, model_folder, tmp_path):
    job, _ = run
    model, tokenizer = mlx_afm.load(model_folder, job.adapter_path)
    fused, _ = mlx_afm.load(mlx_afm.fuse(model_folder, job.adapter_path, tmp_path / "fused").folder)
    assert not mx.allclose(model(TOKENS), mlx_afm.load(model_folder)[0](TOKENS), atol=1e-2)
    assert mx.abs(fused(TOKENS) - model(TOKENS)).max().item() <= tolerances.LOGITS_QUANTIZED
    assert mlx_afm.generate(model, tokenizer, "list", max_tokens=4) == mlx_afm.generate(
        fused, tokenizer, "list", max_tokens=4
    )


def test_resumed(run, model_folder, data_folder, tmp_path):
    job, _ = run
    asked, again = [], replace(job, adapter_path=tmp_path / "again")
    assert mlx_afm.train(again, should_stop=lambda: asked.append(1) or len(asked) == 3).interrupted
    mlx_afm.train(replace(again, resume=True))
    for part in ("adapters.safetensors", "best/adapters.safetensors"):
        assert (again.adapter_path / part).read_bytes() == (job.adapter_path / part).read_bytes()


@pytest.mark.parametrize("target", ["x.pt", "x.fmadapter"])
def test_apples_forms_cannot_hold_it(run, target, tmp_path):
    job, _ = run
    kind = job.lora.fine_tune_type
    reason = {"dora": "magnitudes have no place in it", "full": "low-rank updates, not weights"}[kind]
    with pytest.raises(AdapterError, match=rf"{reason} \(expected lora, found {kind}\).*mlx-afm fuse"):
        mlx_afm.convert_adapter(job.adapter_path, tmp_path / target)
    assert not list(tmp_path.iterdir())


def test_mlx_lm_loads_it(run, model_folder):
    """Its loader takes our names; full fine-tuning is plain weights to it."""
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    job, _ = run
    if job.lora.fine_tune_type != "full":
        pytest.skip("its DoRA layer does not know the fused projection")
    model = utils.load_adapters(ModelFolder(model_folder).load_model(), str(job.adapter_path))
    assert mx.allclose(model(TOKENS), mlx_afm.load(model_folder, job.adapter_path)[0](TOKENS), atol=1e-5)


def test_full_trains_every_weight_but_the_quantizers(model_folder):
    model = ModelFolder(model_folder).load_model()
    start_adapter(model, ModelFolder(model_folder), LoRAConfig(fine_tune_type="full"), seed=0)
    trainable = {name for name, _ in tree_flatten(model.trainable_parameters())}
    rest = {name for name, _ in tree_flatten(model.parameters())} - trainable
    assert rest
    assert all(name.endswith(("quant_key_scale", "quant_value_scale")) for name in rest)
    assert {"model.embedding.weight", "model.output_norm.weight"} <= trainable


def test_full_of_some_layers(model_folder, data_folder, tmp_path):
    job, _ = trained(model_folder, data_folder, tmp_path / "a", fine_tune_type="full", layers="reuse")
    weights = read_adapter(job.adapter_path, ModelFolder(model_folder).config).weights
    assert weights
    assert all(name.startswith("model.kv_reuse_layers.") for name in weights)
    model = mlx_afm.load(model_folder, job.adapter_path)[0]
    base = dict(tree_flatten(ModelFolder(model_folder).load_model().parameters()))
    changed = {name for name, array in tree_flatten(model.parameters()) if not mx.array_equal(array, base[name])}
    assert changed == set(weights)


def test_full_on_a_sixteen_bit_base_is_trained_in_float32_and_loaded_in_its_dtype(
    toolkit_folder, data_folder, tmp_path
):
    folder = convert(toolkit_folder, tmp_path / "bf16", dtype="bfloat16").folder
    job, _ = trained(folder, data_folder, tmp_path / "a", fine_tune_type="full", layers="last-1")
    adapter = read_adapter(job.adapter_path)
    assert {tensor.dtype for tensor in adapter.weights.values()} == {"float32"}
    model, _ = mlx_afm.load(folder, job.adapter_path)
    arrays = dict(tree_flatten(model.parameters()))
    for name, tensor in adapter.weights.items():
        assert arrays[name].dtype == mx.bfloat16
        assert mx.array_equal(arrays[name], mx.array(tensor.read_values()).astype(mx.bfloat16))


@pytest.mark.parametrize("form", ["folder", "pt", "fmadapter"])
def test_from_the_values_of_an_adapter_of_any_form(form, model_folder, adapter_forms):
    model, given = ModelFolder(model_folder).load_model(), read_adapter(adapter_forms["folder"])
    start_adapter(model, ModelFolder(model_folder), LoRAConfig(), seed=0, adapter_file=adapter_forms[form])
    arrays = dict(tree_flatten(model.trainable_parameters()))
    assert set(arrays) == set(given.weights)
    assert all(np.array_equal(np.array(arrays[name]), tensor.read_values()) for name, tensor in given.weights.items())


def test_a_feature_adapter_grows_from_another(model_folder, data_folder, adapter_forms, tmp_path):
    """Only what is asked for is trained; the rest of the adapter it grew from goes along."""
    job = LoRAJob(
        model=model_folder, data=data_folder, adapter_path=tmp_path / "a", train=CONFIG,
        lora=LoRAConfig(targets=("o",), layers="0"), resume_adapter_file=adapter_forms["pt"],
    )  # fmt: skip
    mlx_afm.train(job)
    grown, given = read_adapter(job.adapter_path), read_adapter(adapter_forms["folder"])
    changed = {
        n for n, t in grown.weights.items() if not np.array_equal(t.read_values(), given.weights[n].read_values())
    }
    assert changed == {f"model.layers.0.self_attn.out_proj.lora_{side}" for side in "ab"}
    named = replace(
        job, adapter_path=tmp_path / "b", resume_adapter_file=adapter_forms["folder"] / "adapters.safetensors"
    )
    mlx_afm.train(named)
    same = read_adapter(named.adapter_path).weights
    assert all(np.array_equal(tensor.read_values(), grown.weights[name].read_values()) for name, tensor in same.items())
    with pytest.raises(ConfigError, match=r"adapter to start from: the run has [0-9a-f]{12}, asked for none"):
        mlx_afm.train(replace(job, resume=True, resume_adapter_file=None))


def test_what_the_adapter_lacks_is_new(model_folder, data_folder, tmp_path):
    first, _ = trained(model_folder, data_folder, tmp_path / "a", rank=4, targets=("q",), layers="0-1")
    model = ModelFolder(model_folder).load_model()
    wanted = LoRAConfig(rank=4, targets=("q", "v"), layers="0-1")
    form = start_adapter(model, ModelFolder(model_folder), wanted, seed=0, adapter_file=first.adapter_path)
    assert (form.targets, form.layers) == (("q", "v"), "0-1")
    arrays, given = dict(tree_flatten(model.trainable_parameters())), read_adapter(first.adapter_path).weights
    assert all(np.array_equal(np.array(arrays[name]), tensor.read_values()) for name, tensor in given.items())
    assert all(not mx.any(array).item() for name, array in arrays.items() if name.endswith(".v.lora_b"))
    assert len(arrays) == 2 * len(given)


def test_from_dora_and_full(run, model_folder):
    job, _ = run
    model = ModelFolder(model_folder).load_model()
    start_adapter(model, ModelFolder(model_folder), job.lora, seed=0, adapter_file=job.adapter_path)
    adapted = mlx_afm.load(model_folder, job.adapter_path)[0]
    assert mx.array_equal(model(TOKENS), adapted(TOKENS))
    with pytest.raises(ConfigError, match=f"another form .*--fine-tune-type {job.lora.fine_tune_type}"):
        start_adapter(
            ModelFolder(model_folder).load_model(),
            ModelFolder(model_folder),
            LoRAConfig(),
            seed=0,
            adapter_file=job.adapter_path,
        )


def test_another_rank_or_less_than_there_is_is_refused(run, model_folder, adapter_forms):
    with pytest.raises(ConfigError, match=r"expected rank 32, scale 0.5, found rank 8, .*--rank 32 --scale 0.5"):
        start_adapter(
            ModelFolder(model_folder).load_model(),
            ModelFolder(model_folder),
            LoRAConfig(rank=8),
            seed=0,
            adapter_file=adapter_forms["pt"],
        )
    job, _ = run
    if job.lora.fine_tune_type == "full":
        less = replace(job.lora, layers="0")
        with pytest.raises(AdapterError, match=r"changes more than would be trained.*--layers all"):
            start_adapter(
                ModelFolder(model_folder).load_model(),
                ModelFolder(model_folder),
                less,
                seed=0,
                adapter_file=job.adapter_path,
            )
