"""Recovery adapters: trained against a teacher, kept in the base, and feature adapters that start from there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_afm
from mlx_afm import LoRAConfig, LoRAJob, TrainConfig
from mlx_afm.adapters import adapter_weights, read_adapter
from mlx_afm.data import make_batch, read_tokens
from mlx_afm.errors import ConfigError
from mlx_afm.model_folder import ModelFolder
from mlx_afm.quant import QuantConfig
from mlx_afm.quant.residual import InitConfig
from mlx_afm.runs.start import start_adapter
from mlx_afm.training.distill import distillation_from
from mlx_afm.workflows.convert import convert
from mlx_afm.workflows.recover import RecoverJob, recover

RANK4 = LoRAConfig(rank=4)
CONFIG = TrainConfig(iters=6, batch_size=4, learning_rate=4e-3, steps_per_eval=3, save_every=3)
TOKENS = mx.arange(3, 40)[None]


@pytest.fixture(scope="module")
def codes(model_folder, tmp_path_factory):
    return convert(
        model_folder, tmp_path_factory.mktemp("codes") / "q", quantization=QuantConfig(recipe="apple")
    ).folder


def job_of(folder, teacher, data_folder, path, *, loss="distill", into_base=False, lora=RANK4, **run):
    run = LoRAJob(model=folder, data=data_folder, adapter_path=path, lora=lora, train=CONFIG, cache=None, **run)
    return RecoverJob(run=run, loss=loss, teacher=teacher, into_base=into_base)


def distance(folder, adapter, teacher, data_folder):
    """Divergence from the teacher on what was trained on, nats a token."""
    model, _ = mlx_afm.load(folder, adapter)
    batch = make_batch(list(read_tokens((data_folder / "train.jsonl",), folder / "tokenizer.model")))
    loss = distillation_from(mlx_afm.load(teacher)[0])(model, batch, False)
    return (loss / batch.weights_BN.sum()).item()


@pytest.fixture(scope="module")
def recovered(codes, model_folder, data_folder, tmp_path_factory):
    job = job_of(codes, model_folder, data_folder, tmp_path_factory.mktemp("run") / "a")
    return job, recover(job)


def test_it_comes_nearer_to_the_teacher(recovered, codes, model_folder, data_folder):
    job, done = recovered
    assert done.base_adapter is None
    before = distance(codes, None, model_folder, data_folder)
    assert distance(codes, job.run.adapter_path, model_folder, data_folder) < 0.7 * before
    settings = json.loads((job.run.adapter_path / "adapter_config.json").read_text())
    assert settings["sources"]["loss"] == "distill"
    assert len(settings["sources"]["teacher"]) == 64


def test_memory_told_counts_the_teacher(codes, model_folder, data_folder, tmp_path):
    from mlx_afm.training import MemoryEstimated

    told = []
    for loss, teacher in (("next-token", None), ("distill", model_folder)):
        job = job_of(codes, teacher, data_folder, tmp_path / loss, loss=loss)
        recover(job, on_event=told.append, should_stop=lambda: True)
    first, second = (event.peak_bytes for event in told if isinstance(event, MemoryEstimated))
    assert second - first == sum(
        array.nbytes for _, array in tree_flatten(ModelFolder(model_folder).load_model().parameters())
    )


def test_resumed_it_ends_the_same_and_another_teacher_is_refused(recovered, tmp_path, copy_of, model_folder):
    job, _ = recovered
    asked, again = [], replace(job, run=replace(job.run, adapter_path=tmp_path / "again"))
    stopped = recover(again, should_stop=lambda: asked.append(1) or len(asked) == 3)
    assert stopped.trained.interrupted
    goes_on = replace(again, run=replace(again.run, resume=True))
    other = copy_of(model_folder, "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(ConfigError, match=r"other settings[\s\S]*teacher: the run has"):
        recover(replace(goes_on, teacher=other))
    with pytest.raises(ConfigError, match=r"other settings[\s\S]*loss: the run has distill, asked for none"):
        recover(replace(goes_on, loss="next-token", teacher=None))
    recover(goes_on)
    for part in ("adapters.safetensors", "best/adapters.safetensors"):
        assert (again.run.adapter_path / part).read_bytes() == (job.run.adapter_path / part).read_bytes()


def test_two_tiers(codes, model_folder, data_folder, tmp_path, copy_of):
    """Recovered into the base; a feature adapter starts there, replaces it, and without one the base's is active."""
    folder = copy_of(codes, "base")
    job = job_of(folder, model_folder, data_folder, tmp_path / "recovery", into_base=True)
    done = recover(job)
    assert done.base_adapter == folder / "base_adapter"
    assert read_adapter(done.base_adapter).config == RANK4
    tuned, live = mlx_afm.load(folder)[0], mlx_afm.load(codes, job.run.adapter_path)[0]
    assert mx.array_equal(tuned(TOKENS), live(TOKENS))
    assert not mx.allclose(tuned(TOKENS), mlx_afm.load(codes)[0](TOKENS), atol=1e-2)

    model = ModelFolder(folder).load_model()
    start_adapter(model, ModelFolder(folder), RANK4, seed=0)
    assert mx.array_equal(model(TOKENS), tuned(TOKENS))
    feature = LoRAJob(model=folder, data=data_folder, adapter_path=tmp_path / "f", lora=RANK4, train=CONFIG, cache=None)
    result = mlx_afm.train(feature)
    valid = data_folder / "valid.jsonl"
    assert result.best_loss < mlx_afm.score(folder, None, valid).loss
    stored = ModelFolder(folder).base_adapter.weights
    changed = mlx_afm.load(folder, feature.adapter_path)[0]
    assert {name: a.shape for name, a in adapter_weights(changed).items()} == {n: t.shape for n, t in stored.items()}
    assert any(
        not np.array_equal(np.array(a), stored[name].read_values()) for name, a in adapter_weights(changed).items()
    )
    with pytest.raises(ConfigError, match=r"active adapter.*expected rank 4, scale 0.5, found rank 8"):
        mlx_afm.train(replace(feature, lora=LoRAConfig(rank=8), adapter_path=tmp_path / "g"))


def test_of_next_token_the_best_is_kept(codes, data_folder, tmp_path, copy_of):
    folder, fast = copy_of(codes, "base"), replace(CONFIG, learning_rate=0.3)  # which the last step does not survive
    job = job_of(folder, None, data_folder, tmp_path / "a", loss="next-token", into_base=True)
    recover(replace(job, run=replace(job.run, train=fast)))
    kept, best, last = (
        read_adapter(path).weights["model.layers.0.mlp.up_proj.lora_a"].read_values()
        for path in (folder / "base_adapter", job.run.adapter_path / "best", job.run.adapter_path)
    )
    assert np.array_equal(kept, best)
    assert not np.array_equal(best, last)


def test_it_goes_on_from_a_start_value_in_the_base(model_folder, data_folder, tmp_path):
    init = InitConfig(rank=4, rounds=2)
    made = convert(model_folder, tmp_path / "q", quantization=QuantConfig(recipe="apple"), init_adapter=init)
    before = distance(made.folder, None, model_folder, data_folder)
    config = replace(CONFIG, learning_rate=5e-4)
    job = job_of(made.folder, model_folder, data_folder, tmp_path / "a", into_base=True)
    recover(replace(job, run=replace(job.run, train=config)))
    assert distance(made.folder, None, model_folder, data_folder) < before


def test_an_interrupted_run_leaves_the_base_alone(codes, model_folder, data_folder, tmp_path, copy_of):
    folder = copy_of(codes, "base")
    job = job_of(folder, model_folder, data_folder, tmp_path / "a", into_base=True)
    done = recover(job, should_stop=lambda: True)
    assert (done.trained.interrupted, done.base_adapter) == (True, None)
    assert not (folder / "base_adapter").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher": None}, "teacher: expected the unquantized model's folder, found None"),
        ({"loss": "next-token"}, "teacher: expected none: with loss next-token no teacher is used"),
        ({"loss": "mse"}, "loss: expected distill or next-token, found mse"),
        ({"into_base": True, "lora": LoRAConfig(targets=("q",))}, "has all projections"),
        ({"lora": LoRAConfig(fine_tune_type="dora")}, "fine_tune_type: recover trains lora only, found dora"),
    ],
)
def test_settings_that_do_not_go_together(changes, says, codes, model_folder, data_folder, tmp_path):
    with pytest.raises(ConfigError, match=says):
        job_of(codes, changes.pop("teacher", model_folder), data_folder, tmp_path / "a", **changes)


def test_a_dense_model_and_a_teacher_that_reads_other_tokens_are_refused(
    codes, model_folder, data_folder, tmp_path, copy_of, edit_json
):
    with pytest.raises(ConfigError, match=r"nothing to recover.*convert -q"):
        recover(job_of(model_folder, model_folder, data_folder, tmp_path / "a"))
    other = copy_of(model_folder, "other")
    (other / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes() + b"\n")
    with pytest.raises(ConfigError, match="another tokenizer"):
        recover(job_of(codes, other, data_folder, tmp_path / "a"))
    edit_json(other / "config.json", vocab_size=500)
    with pytest.raises(ConfigError, match=r"another vocabulary \(expected 512, found 500\)"):
        recover(job_of(codes, other, data_folder, tmp_path / "a"))
    shutil.rmtree(other)
    with pytest.raises(ConfigError, match="changes a folder of yours"):
        recover(job_of(other, model_folder, data_folder, tmp_path / "a", into_base=True))
    assert not (tmp_path / "a").exists()
