"""Draft models trained against a target: acceptance rises, runs resume, misfits are refused."""

import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import mlx_afm
from mlx_afm import LoRAJob, TrainConfig
from mlx_afm.draft.losses import LOSSES
from mlx_afm.errors import ConfigError, SettingError
from mlx_afm.formats.safetensors_file import read_safetensors
from mlx_afm.model_folder import ModelFolder
from mlx_afm.quant import QuantConfig
from mlx_afm.training import Evaluated, Notice
from mlx_afm.workflows.convert import convert
from mlx_afm.workflows.draft import MODEL, WHOLE, DraftJob, measure_pair, new_draft, train_draft
from mlx_afm.workflows.draft_model import load_draft

CONFIG = TrainConfig(epochs=6, batch_size=4, learning_rate=1e-2, steps_per_eval=10, save_every=5, schedule="constant")


@pytest.fixture(scope="module")
def start(model_folder, tmp_path_factory):
    return new_draft(tmp_path_factory.mktemp("draft") / "start", model_folder, layers=2, width=32, heads=2)


@pytest.fixture
def job(start, model_folder, data_folder, tmp_path):
    def make(name="run", loss="forward-kl", adapter=None, config=CONFIG, target=model_folder, draft=start, **settings):
        run = LoRAJob(
            **{
                "model": draft,
                "data": data_folder,
                "adapter_path": tmp_path / name,
                "train": config,
                "lora": WHOLE,
                "cache": tmp_path / "cache",
                **settings,
            }
        )
        return DraftJob(run=run, target=target, target_adapter=adapter, loss=loss)

    return make


def losses_told(job, **more):
    told = []
    done = train_draft(job, told.append, **more)
    return done, [event.loss for event in told if isinstance(event, Evaluated)], told


def test_the_checkpoint_of_the_toolkit_is_the_same_model(job, tmp_path):
    done, _, _ = losses_told(job(config=replace(CONFIG, epochs=1)))
    checkpoint = tmp_path / "run" / "draft-model-final.pt"
    back = convert(checkpoint, tmp_path / "back", dtype="float32", no_tokenizer=True).folder
    ours, again = (ModelFolder(folder).load_model() for folder in (done.folder, back))
    tokens = mx.arange(3, 20)[None]
    assert mx.array_equal(ours(tokens), again(tokens))


@pytest.mark.parametrize("loss", LOSSES)
def test_acceptance_rises(job, loss):
    done, told, _ = losses_told(job(loss=loss))
    before, after = done.before.acceptance, done.after.acceptance
    assert after.sampled > before.sampled + 0.05
    if loss != "toolkit":  # whose examples weigh the same, whatever their lengths
        assert min(told) == pytest.approx(1 - after.sampled, rel=1e-4)  # what evaluations tell is what is refused
    assert done.trained.best_loss == min(told)
    assert done.folder.name == MODEL
    assert len(done.after.speed_ups) == len(done.after.break_even) == 8


def test_the_trained_draft_speeds_answers_up_without_changing_them(job, model_folder):
    done, _, _ = losses_told(job())
    model, tokenizer = mlx_afm.load(model_folder)
    prompts = ["list the files in docs", "copy a.txt to b"]
    plain = [mlx_afm.generate(model, tokenizer, prompt, max_tokens=24) for prompt in prompts]
    for folder in (done.folder, job().run.model):
        speculation = load_draft(folder, model, tokenizer, 3)
        answers = mlx_afm.batch_generate(model, tokenizer, prompts, max_tokens=24, speculation=speculation)
        assert [answer.text for answer in answers] == plain


def test_a_run_over_kept_states_is_the_one_without_and_a_resumed_one_ends_the_same(job, tmp_path):
    def values(name):
        return {n: t.read_values() for n, t in read_safetensors(tmp_path / name / "adapters.safetensors").items()}

    def same(one, other):
        return all(np.array_equal(one[name], other[name]) for name in one)

    losses_told(job("whole", frozen_cache="recompute"))
    losses_told(job("kept"))
    _, _, told = losses_told(job("again"))
    assert any("24 of 24 examples are there" in event.text for event in told if isinstance(event, Notice))
    assert same(values("whole"), values("kept"))
    assert same(values("whole"), values("again"))
    steps = []
    left, _, _ = losses_told(job("left"), should_stop=lambda: steps.append(1) or len(steps) > 7)
    assert left.trained.interrupted
    assert left.folder is None
    losses_told(job("left", resume=True))
    assert same(values("whole"), values("left"))
    with pytest.raises(ConfigError, match="loss"):
        losses_told(job("left", loss="tv", resume=True))


def test_the_target_may_have_an_adapter_and_be_quantized(job, model_folder, adapter_forms, tmp_path):
    plain, *_ = losses_told(job("plain"))
    adapted, *_ = losses_told(job("adapted", adapter=adapter_forms["fmadapter"]))
    assert adapted.after.acceptance.sampled != plain.after.acceptance.sampled
    with pytest.raises(ConfigError, match="adapter of the teacher"):
        losses_told(job("adapted", adapter=adapter_forms["folder"], resume=True))
    folder = convert(model_folder, tmp_path / "q", quantization=QuantConfig(recipe="apple")).folder
    done, *_ = losses_told(job("2-bit", target=folder))
    assert done.after.acceptance.sampled > done.before.acceptance.sampled


def test_an_untrained_pair_can_be_measured(job, model_folder):
    run = job().run
    itself = measure_pair(model_folder, None, run, model_folder)
    assert itself.acceptance.sampled >= 0.999
    assert itself.acceptance.greedy == 1.0
    assert itself.cost_ratio == pytest.approx(1.0, abs=0.9)
    only_train = replace(run, data=run.data / "train.jsonl")
    assert measure_pair(model_folder, None, only_train, run.model).acceptance.tokens > itself.acceptance.tokens


def test_what_does_not_fit_is_refused(job, start, model_folder, tmp_path, edit_json):
    with pytest.raises(SettingError, match="loss"):
        job(loss="x")
    with pytest.raises(SettingError, match="a draft model is trained whole"):
        DraftJob(run=LoRAJob(model="m", data="d", adapter_path="a"), target=model_folder)
    quantized = convert(start, tmp_path / "q", quantization=QuantConfig(bits=8, group_size=32)).folder
    with pytest.raises(ConfigError, match="a quantized draft model cannot be trained whole"):
        losses_told(job(draft=quantized))
    other = tmp_path / "other"
    shutil.copytree(start, other)
    (other / "tokenizer.model").unlink()
    assert ModelFolder(other).tokenizer is None
    losses_told(job("no tokenizer", draft=other, config=replace(CONFIG, epochs=1)))  # the target's is used
    with pytest.raises(ConfigError, match="something is there already"):
        new_draft(start, model_folder)
