"""Export, import and comparison of whole adapters: what a package says, and that it says the same to the model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import tolerances
from mlx_afm import __version__
from mlx_afm.adapters import LoRAConfig, read_adapter, write_adapter_folder
from mlx_afm.errors import AdapterError, ConfigError
from mlx_afm.formats.fmadapter import PUBLIC_SIGNATURE, read_fmadapter
from mlx_afm.model_folder import ModelFolder
from mlx_afm.runs.job import LoRAJob
from mlx_afm.training import TrainConfig
from mlx_afm.workflows.check import CheckConfig, check_package
from mlx_afm.workflows.export import ExportConfig, convert_adapter, export_fmadapter, export_package
from mlx_afm.workflows.load import load
from mlx_afm.workflows.logit_change import logit_change
from mlx_afm.workflows.lora import train
from tiny import random_adapter

SMALL = 0.02  # of B: an adapter of the size of a trained one


def values(path, base=None):
    return {name: np.array(t.read_values(), np.float32) for name, t in read_adapter(path, base).weights.items()}


@pytest.fixture
def new_folder(model_folder, tmp_path):
    """A function that writes a random adapter of some form for the small model."""

    def make(config=None, size=1.0):
        adapter = random_adapter(ModelFolder(model_folder).config, config)
        scaled = {
            name: (t.read_values() * np.float32(size if name.endswith("b") else 1))
            for name, t in adapter.weights.items()
        }
        folder = tmp_path / "adapter"
        tensors = {
            name: replace(adapter.weights[name], read_stored=lambda a=array: a) for name, array in scaled.items()
        }
        write_adapter_folder(folder, replace(adapter, weights=tensors))
        return folder

    return make


def exported(folder, tmp_path, **settings):
    return export_package(ExportConfig(adapter=folder, name="box", output_dir=tmp_path / "out", **settings))


@pytest.mark.parametrize(
    "config", [LoRAConfig(rank=8, alpha=20), LoRAConfig(rank=5, alpha=3, use_rslora=True)], ids=str
)
def test_a_padded_and_folded_adapter_gives_the_same_logits_imported(config, new_folder, model_folder, tmp_path):
    folder = new_folder(config, SMALL)
    result = exported(folder, tmp_path, model=model_folder)
    assert read_fmadapter(result.package)[0].rank == 32
    # Of logits up to 18; a key or value on the edge of a quantizer step may fall the other way.
    assert result.logits.max_change < tolerances.ADAPTER_FP16 * result.logits.largest_logit
    assert result.logits.mean_change < tolerances.ADAPTER_FP16
    assert result.logits.same_choice == 1
    assert result.logits.tokens > 30
    # Imported as a folder, it is the same adapter still.
    imported = convert_adapter(result.package, tmp_path / "imported")
    again = logit_change(ModelFolder(model_folder), read_adapter(imported), result.package, ["copy abc"])
    assert again.max_change == 0
    told = " ".join(result.notes())
    assert f"rank {config.rank} padded to 32 with zeros: exact" in told
    assert f"folded into B (times {config.scale / 0.5:g})" in told
    assert "logits change by" in told


def test_a_logit_change_is_seen(new_folder, model_folder, adapter_forms):
    change = logit_change(
        ModelFolder(model_folder), read_adapter(new_folder()), adapter_forms["fmadapter"], ["copy abc"]
    )
    assert change.max_change == 0
    other = logit_change(
        ModelFolder(model_folder), read_adapter(new_folder(size=0.1)), adapter_forms["fmadapter"], ["copy abc"]
    )
    assert other.max_change > 1
    assert other.same_choice < 1
    assert other.to_dict()["largest_logit"] > 1


@pytest.mark.parametrize("form", ["pt", "folder"])
def test_import_is_the_exact_inverse(form, adapter_forms, model_folder, tmp_path):
    target = tmp_path / ("back.pt" if form == "pt" else "back")
    convert_adapter(adapter_forms["fmadapter"], target)
    base = ModelFolder(model_folder).config
    wanted, found = values(adapter_forms["folder"]), values(target, base)
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())
    package = convert_adapter(target, tmp_path / "box.fmadapter", model_path=model_folder)
    weights = "adapter_weights.bin"
    assert (package / weights).read_bytes() == (adapter_forms["fmadapter"] / weights).read_bytes()


def test_export_is_deterministic_to_the_byte(new_folder, model_folder, tmp_path):
    folder, seen = new_folder(LoRAConfig(rank=40)), set()
    for _ in range(2):
        result = exported(folder, tmp_path, model=model_folder, reduce_rank=True, compare=False)
        seen.add(tuple((path.name, path.read_bytes()) for path in sorted(result.package.iterdir())))
    assert len(seen) == 1
    assert result.form.max_reduction_error > 0.1


def test_partial_adapters_take_the_base_models_tensors(new_folder, model_folder, tmp_path):
    folder = new_folder(LoRAConfig(rank=32, targets=("q", "v"), layers="ordinary"), SMALL)
    with pytest.raises(AdapterError, match=r"--model(.|\n)*--zero-untrained"):
        exported(folder, tmp_path)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    result = exported(folder, tmp_path, model=model_folder)
    own, trained = ModelFolder(model_folder).base_adapter.weights, values(folder)
    for name, array in values(result.package).items():
        expected = trained[name] if name in trained else own[name].read_values()
        assert np.array_equal(array, expected.astype(np.float16)), name
    assert result.logits.mean_change < tolerances.ADAPTER_FP16
    zeros = exported(folder, tmp_path, zero_untrained=True)
    assert zeros.form.filled_from == "zeros"
    assert "A5" in {finding.rule for finding in zeros.report.findings}


def test_a_pt_takes_the_rank_and_scale_of_the_toolkits_json(new_folder, model_folder, tmp_path):
    notes = []
    target = convert_adapter(new_folder(LoRAConfig(rank=8, scale=1.0)), tmp_path / "a.pt", on_note=notes.append)
    adapter = read_adapter(target, ModelFolder(model_folder).config)
    assert (adapter.config.rank, adapter.config.scale) == (32, 0.5)
    assert notes == ["rank 8 padded to 32 with zeros: exact", "scale 1 folded into B (times 2): devices apply 0.5"]


# What a package says.


def test_metadata_has_the_eight_keys_and_what_was_given(new_folder, tmp_path):
    result = exported(
        new_folder(), tmp_path, author="Ä. Author", description="d", license="MIT", signature="ab" * 20,
        creator_defined={"version": "2", "nested": {"b": 1, "a": [True, None]}},
    )  # fmt: skip
    raw = (result.package / "metadata.json").read_text(encoding="utf-8")
    content = json.loads(raw)
    assert list(content) == [
        "adapterIdentifier", "author", "baseModelSignature", "creatorDefined", "description", "license", "loraRank",
        "speculativeDecodingDraftTokenCount",
    ]  # fmt: skip
    assert raw == json.dumps(content, sort_keys=True, indent=4, ensure_ascii=False)
    assert content["adapterIdentifier"] == "fmadapter-box-abababa"
    assert (content["author"], content["license"], content["description"]) == ("Ä. Author", "MIT", "d")
    assert content["creatorDefined"]["nested"] == {"a": [True, None], "b": 1}
    assert content["creatorDefined"]["mlx_afm"]["lineage"] == {"library": f"mlx-afm {__version__}"}
    assert "Signature of toolkit" not in " ".join(result.notes())


def test_the_librarys_own_key_cannot_be_given(new_folder, tmp_path):
    with pytest.raises(ConfigError, match="mlx_afm: creatorDefined"):
        exported(new_folder(), tmp_path, creator_defined={"mlx_afm": {}})


def test_the_signature_is_the_toolkits_unless_given(new_folder, tmp_path):
    folder = new_folder()
    (tmp_path / "kit" / "export").mkdir(parents=True)
    (tmp_path / "kit" / "export" / "constants.py").write_text(f'BASE_SIGNATURE = "{"cd" * 20}"\n')
    assert exported(folder, tmp_path, toolkit=tmp_path / "kit").metadata.signature == "cd" * 20
    given = exported(folder, tmp_path, toolkit=tmp_path / "kit", signature="ab" * 20)
    assert given.metadata.signature == "ab" * 20
    public = exported(folder, tmp_path)
    assert public.metadata.signature == PUBLIC_SIGNATURE
    assert any("OS 26.1 and 26.4" in text and "OS 27" in text for text in public.notes())


def test_a_package_exported_again_keeps_what_it_says(new_folder, tmp_path):
    first = exported(new_folder(), tmp_path, author="me", signature="ab" * 20, creator_defined={"v": "1"})
    again = export_package(
        ExportConfig(adapter=first.package, name="other", output_dir=tmp_path, creator_defined={"w": "2"})
    )
    assert again.metadata.identifier == "fmadapter-other-abababa"
    assert (again.metadata.author, again.metadata.creator_defined["v"]) == ("me", "1")
    assert again.metadata.creator_defined["w"] == "2"
    assert again.metadata.creator_defined["mlx_afm"] == first.metadata.creator_defined["mlx_afm"]


def test_lineage_tells_settings_data_and_base(model_folder, data_folder, new_folder, tmp_path):
    run = TrainConfig(iters=1, batch_size=2)

    def lineage(data=data_folder, train_config=run, name="run"):
        job = LoRAJob(model=model_folder, data=data, adapter_path=tmp_path / name, train=train_config, cache=None)
        train(job)
        result = exported(job.adapter_path, tmp_path, model=model_folder, compare=False)
        assert not result.base_differs
        return result.metadata.creator_defined["mlx_afm"]["lineage"]

    first = lineage()
    assert set(first) == {"library", "training", "data", "base_model"}
    assert first["base_model"] == ModelFolder(model_folder).fingerprint
    assert all(len(first[name]) == 64 for name in ("training", "data", "base_model"))
    assert lineage(name="again") == first
    other = lineage(train_config=TrainConfig(iters=1, batch_size=2, learning_rate=2e-3), name="rate")
    assert {name for name in first if first[name] != other[name]} == {"training"}
    half = tmp_path / "half"
    half.mkdir()
    lines = (data_folder / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (half / "train.jsonl").write_text("".join(lines[:10]), encoding="utf-8")
    assert lineage(data=half, name="data")["data"] != first["data"]
    config = tmp_path / "run" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "sources": {**content["sources"], "base model": "0" * 64}}))
    changed = exported(tmp_path / "run", tmp_path, model=model_folder, compare=False)
    assert changed.base_differs
    assert "another base model" in " ".join(changed.notes())


# The reference answers.


def test_the_reference_answers_holds_greedy_answers_with_the_packages_values(new_folder, model_folder, tmp_path):
    from mlx_afm.generation import generate

    prompts = ("copy abc", "sort vido.conf in reverse")
    result = exported(new_folder(size=SMALL), tmp_path, model=model_folder, reference_answers=True, prompts=prompts)
    content = json.loads(result.reference_answers.read_text(encoding="utf-8"))
    assert result.reference_answers == tmp_path / "out" / "box.reference_answers.json"
    assert set(content) == {"adapterIdentifier", "maximumResponseTokens", "steps"}
    assert content["adapterIdentifier"] == "fmadapter-box-9799725"
    model, tokenizer = load(model_folder, result.package)
    for step, prompt in zip(content["steps"], prompts, strict=True):
        messages = [{"role": "system", "content": step["instructions"]}, {"role": "user", "content": prompt}]
        assert step["prompt"] == prompt
        assert step["answer"] == generate(model, tokenizer, messages, max_tokens=content["maximumResponseTokens"])
        assert step["answer"]


def test_the_reference_answers_needs_the_model(new_folder, tmp_path):
    with pytest.raises(ConfigError, match="no base model"):
        exported(new_folder(), tmp_path, reference_answers=True)


# Comparing.


@pytest.mark.parametrize("form", ["folder", "pt", "fmadapter"])
def test_check_expects_any_form(form, adapter_forms, model_folder, new_folder, tmp_path):
    config = CheckConfig(package=adapter_forms["fmadapter"], expect=adapter_forms[form], model=model_folder)
    assert {f.rule for f in check_package(config).findings} == {"G1"}
    other = replace(config, package=exported(new_folder(size=0.5), tmp_path).package)
    assert check_package(other).broken == ("E3",)


@pytest.mark.parametrize(
    ("config", "allowed"),
    [
        (LoRAConfig(rank=8, scale=2.0), {}),
        (LoRAConfig(rank=40), {"reduce_rank": True}),
        (LoRAConfig(rank=4, targets=("o",)), {"zero_untrained": True}),
    ],
    ids=str,
)
def test_check_compares_after_folding_padding_and_filling(config, allowed, new_folder, tmp_path):
    folder = new_folder(config)
    package, report = export_fmadapter(folder, "box", tmp_path / "out", **allowed)
    assert report.ok
    assert check_package(CheckConfig(package=package, expect=folder, **allowed)).ok
    if allowed:
        with pytest.raises(AdapterError):
            check_package(CheckConfig(package=package, expect=folder))


def test_check_of_a_package_without_metadata_still_compares(new_folder, tmp_path):
    folder = new_folder()
    package, _ = export_fmadapter(folder, "box", tmp_path / "out")
    (package / "metadata.json").unlink()
    assert check_package(CheckConfig(package=package, expect=folder)).broken[-1] == "P2"
