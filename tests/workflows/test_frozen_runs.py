"""Runs whose lower layers are frozen: what is kept changes no number, is found by the next run, and is never needed."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_afm import LoRAConfig, LoRAJob, TrainConfig, train
from mlx_afm.data.read import cache_folder
from mlx_afm.errors import ConfigError, SettingError
from mlx_afm.formats.safetensors_file import read_safetensors
from mlx_afm.model import Model
from mlx_afm.model_folder import ModelFolder
from mlx_afm.quant import QuantConfig
from mlx_afm.runs.activation_store import STORES, list_stores
from mlx_afm.training import MemoryEstimated, Notice
from mlx_afm.workflows.convert import convert
from mlx_afm.workflows.recover import RecoverJob, recover

CONFIG = TrainConfig(epochs=3, batch_size=4, learning_rate=4e-3, steps_per_eval=4, save_every=3, steps_per_report=1)
REUSE, LAST, FULL = (LoRAConfig(rank=4, layers=layers) for layers in ("reuse", "last-1", "last-4"))


@pytest.fixture
def run(model_folder, data_folder, tmp_path):
    """Trains, and gives the adapter's values, the losses told and the notices."""

    def start(name="run", mode="auto", lora=REUSE, config=CONFIG, model=model_folder, stop_after=None, **settings):
        told, steps = [], []
        job = LoRAJob(
            **{
                "model": model,
                "data": data_folder,
                "adapter_path": tmp_path / name,
                "lora": lora,
                "train": config,
                "cache": tmp_path / "cache",
                "frozen_cache": mode,
                **settings,
            }
        )
        done = train(job, told.append, lambda: steps.append(1) or (stop_after is not None and len(steps) > stop_after))
        values = {n: t.read_values() for n, t in read_safetensors(tmp_path / name / "adapters.safetensors").items()}
        losses = [event.loss for event in told if hasattr(event, "loss")]
        notices = " ".join(event.text for event in told if isinstance(event, Notice))
        return done, values, losses, notices, told

    return start


@pytest.fixture
def loads(monkeypatch):
    """The layers that were asked of the model folder."""
    asked, plain = [], ModelFolder.load_model

    def load_model(self, *, lazy=False, layers=None):
        asked.append(layers)
        return plain(self, lazy=lazy, layers=layers)

    monkeypatch.setattr(ModelFolder, "load_model", load_model)
    return asked


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def assert_near(kept, plain):
    """Rounding alone differs; it grows once a key or value lies so near to the middle of two int8 numbers that it is
    rounded to the other one."""
    assert kept[:5] == pytest.approx(plain[:5], rel=1e-5)
    assert kept == pytest.approx(plain, rel=5e-3)


PACKED = replace(CONFIG, batch_size=4, batch_tokens=200)
CASES = {
    "reuse": (REUSE, CONFIG),
    "last": (LAST, CONFIG),
    "from a full layer on": (FULL, CONFIG),
    "packed": (REUSE, PACKED),
    "packed, full": (FULL, PACKED),
    "dora": (replace(REUSE, fine_tune_type="dora"), CONFIG),
    "full": (LoRAConfig(fine_tune_type="full", layers="last-1"), replace(CONFIG, learning_rate=1e-4)),
    "dropout above": (replace(REUSE, dropout=0.2), CONFIG),
    "checkpointed": (REUSE, replace(CONFIG, grad_checkpoint=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_kept_and_recomputed_are_the_same_bits_and_near_the_plain_run(run, name):
    lora, config = CASES[name]
    _, plain, losses, _, _ = run("off", "off", lora, config)
    _, first, kept, _, _ = run("auto", "auto", lora, config)
    _, again, found, notice, _ = run("again", "auto", lora, config)
    _, computed, recomputed, _, _ = run("recompute", "recompute", lora, config)
    assert kept == found == recomputed
    assert equal(first, computed)
    assert equal(first, again)
    if not lora.dropout:  # whose masks depend on how a batch is laid out
        assert_near(kept, losses)
    assert "24 of 24 examples are there" in notice
    assert plain.keys() == first.keys()


@pytest.mark.parametrize("recipe", [{"bits": 4, "group_size": 32}, {"recipe": "apple"}])
def test_quantized_bases(run, model_folder, tmp_path, recipe):
    folder = convert(model_folder, tmp_path / "q", quantization=QuantConfig(**recipe)).folder
    _, _, losses, _, _ = run("off", "off", model=folder)
    _, first, kept, _, _ = run("auto", model=folder)
    _, computed, recomputed, _, _ = run("recompute", "recompute", model=folder)
    assert kept == recomputed
    assert_near(kept, losses)
    assert equal(first, computed)


def test_another_run_finds_all_and_loads_no_lower_layer(run, loads, tmp_path):
    run("first")
    assert range(4) in loads
    loads.clear()
    changed = replace(CONFIG, seed=7, batch_tokens=300, batch_size=4, learning_rate=1e-3)
    _, _, _, notice, told = run("second", lora=replace(REUSE, rank=8, scale=2.0), config=changed)
    assert "24 of 24 examples are there" in notice
    assert loads == [range(4, 6)]
    assert len(list_stores(tmp_path / "cache" / STORES)) == 1
    run("third", "off")
    plain = [event for event in run("fourth", "off")[4] if isinstance(event, MemoryEstimated)]
    (estimated,) = [event for event in told if isinstance(event, MemoryEstimated)]
    assert estimated.weights_bytes < 0.6 * plain[0].weights_bytes


def test_what_was_computed_for_other_layers_or_weights_is_not_found(run, model_folder, tmp_path):
    run("first")
    assert "0 of 24" in run("other layer", lora=LAST)[3]
    folder = convert(model_folder, tmp_path / "q", quantization=QuantConfig(bits=8, group_size=32)).folder
    assert "0 of 24" in run("other weights", model=folder)[3]
    assert len(list_stores(tmp_path / "cache" / STORES)) == 3


@pytest.mark.parametrize("stop_after", [1, 4, 9])
@pytest.mark.parametrize("lost", [False, True])
def test_a_resumed_run_ends_as_if_it_had_not_been_left(run, tmp_path, stop_after, lost):
    _, whole, losses, _, _ = run("whole")
    left, *_ = run("left", stop_after=stop_after)
    assert left.interrupted
    if lost:
        shutil.rmtree(tmp_path / "cache" / STORES)
    done, values, rest, _, _ = run("left", resume=True)
    assert not done.interrupted
    assert equal(values, whole)
    assert rest[-1] == losses[-1]


def test_a_run_goes_on_in_the_way_it_began(run):
    run("plain", "off", stop_after=3)
    _, values, _, notice, _ = run("plain", resume=True)
    assert "frozen" not in notice
    assert equal(values, run("whole", "off")[1])
    run("kept", stop_after=3)
    with pytest.raises(ConfigError, match="frozen layers"):
        run("kept", "off", resume=True)


def test_no_room_costs_the_run_nothing(run):
    _, expected, _, _, _ = run("whole", "recompute")
    for mode in ("20KB", "1B"):
        _, values, _, notice, _ = run(mode, mode)
        assert "no more activations are kept (it has its full size" in notice
        assert equal(values, expected)


def test_why_layers_are_not_frozen(run):
    once = replace(CONFIG, epochs=1)
    reasons = {
        "the run reads its data once": {"config": once},
        "there is no cache folder": {"cache": None},
        "the lowest layer is trained": {"lora": LoRAConfig(rank=4), "mode": "1GB"},
        "the adapter of the lower layers has dropout": {"lora": replace(REUSE, rank=32, scale=0.5, dropout=0.1)},
    }
    for number, (reason, settings) in enumerate(reasons.items()):
        notice = run(f"run {number}", **settings)[3]
        assert f"the lower layers are computed in every step: {reason}" in notice
    for settings in ({"lora": LoRAConfig(rank=4)}, {"mode": "off"}):
        assert "layers" not in run(f"silent {settings}", **settings)[3]
    assert "0 of 24 examples are there" in run("asked for", "1GB", config=once)[3]


def test_a_setting_that_means_nothing_is_refused(run):
    with pytest.raises(SettingError, match="frozen_cache: expected auto, off, recompute or a size"):
        run("x", "sometimes")


def test_samples_are_those_of_the_whole_model(run):
    def answers(told):
        return [event.answer for event in told if hasattr(event, "answer")]

    plain = answers(run("off", "off", sample_prompts=("list files",), sample_tokens=8)[4])
    kept = [answers(run(name, sample_prompts=("list files",), sample_tokens=8)[4]) for name in ("auto", "again")]
    assert kept == [plain, plain]
    assert plain


def test_distillation_loads_the_teacher_once(model_folder, data_folder, tmp_path, loads):
    student = convert(model_folder, tmp_path / "q", quantization=QuantConfig(recipe="apple")).folder

    def distil(name, mode, lora):
        told = []
        run = LoRAJob(
            model=student,
            data=data_folder,
            adapter_path=tmp_path / name,
            lora=lora,
            train=CONFIG,
            cache=tmp_path / "cache",
            frozen_cache=mode,
        )
        recover(RecoverJob(run=run, teacher=model_folder), on_event=told.append)
        return [event.loss for event in told if hasattr(event, "loss")]

    for name, lora in (("all", LoRAConfig(rank=4)), ("some", REUSE)):
        plain = distil(f"{name} off", "off", lora)
        first = distil(f"{name} first", "auto", lora)
        loads.clear()
        again = distil(f"{name} again", "auto", lora)
        assert first == again == distil(f"{name} recompute", "recompute", lora)
        assert_near(first, plain)
        assert loads[1] == range(0)  # of the teacher its head alone


def test_the_cache_is_beside_the_encoded_data(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_AFM_CACHE", str(tmp_path))
    assert LoRAJob(model="m", data="d", adapter_path="a").cache == cache_folder() == tmp_path


def test_sources_say_how_it_was_computed(run, tmp_path):
    run("kept")
    sources = json.loads((tmp_path / "kept" / "adapter_config.json").read_text())["sources"]
    assert sources["frozen layers"] == "4, in groups by length"


@pytest.fixture(scope="module")
def deep_folder(model_folder, tmp_path_factory):
    """35 + 21 layers as the real model, width 64, random weights, the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    sizes = {"hidden_dim": 64, "num_layers": 56, "num_kv_reuse_layers": 21, "num_heads": 2, "num_kv_heads": 1}
    config = replace(ModelFolder(model_folder).config, **sizes)
    mx.random.seed(3)
    model = Model(config)
    for layer in model.model.layers:
        layer.self_attn.quant_key_scale = layer.self_attn.quant_value_scale = mx.array(0.03)
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    shutil.copy(model_folder / "tokenizer.model", folder)
    return folder


DEEP = TrainConfig(iters=50, batch_size=4, learning_rate=1e-3, steps_per_eval=25, save_every=50, steps_per_report=1)
LAST_16 = LoRAConfig(rank=4, layers="last-16")
DEEP_CASES = {
    "last 16": (LAST_16, DEEP, None),
    "reuse layers": (replace(LAST_16, layers="reuse"), DEEP, None),
    "from a full layer on": (replace(LAST_16, layers="30-55"), DEEP, None),
    "dora": (replace(LAST_16, fine_tune_type="dora"), DEEP, None),
    "full": (LoRAConfig(fine_tune_type="full", layers="last-2"), replace(DEEP, learning_rate=1e-4), None),
    "packed": (LAST_16, replace(DEEP, batch_tokens=200), None),
    "from a full layer on, packed": (replace(LAST_16, layers="30-55"), replace(DEEP, batch_tokens=200), None),
    "4-bit": (LAST_16, DEEP, QuantConfig(bits=4, group_size=32)),
    "balanced 2-bit": (LAST_16, DEEP, QuantConfig(recipe="apple")),
}


@pytest.mark.manual
@pytest.mark.parametrize("name", DEEP_CASES)
def test_fifty_steps_of_56_layers(run, deep_folder, tmp_path, name):
    lora, config, quantization = DEEP_CASES[name]
    folder = deep_folder
    if quantization is not None:
        folder = convert(deep_folder, tmp_path / "q", quantization=quantization).folder
    _, _, plain, _, _ = run("off", "off", lora, config, folder)
    _, first, kept, _, _ = run("auto", "auto", lora, config, folder)
    _, again, found, notice, _ = run("again", "auto", lora, config, folder)
    _, computed, recomputed, _, _ = run("recompute", "recompute", lora, config, folder)
    assert len(kept) >= 50
    assert kept == found == recomputed
    assert equal(first, computed)
    assert equal(first, again)
    assert "24 of 24 examples are there" in notice
    difference = max(abs(one - other) / other for one, other in zip(kept, plain))
    print(f"{name}: {difference:.1e}")
    assert_near(kept, plain)
