"""export, adapter convert, check, fuse: adapters on their way out."""

import json

import numpy as np
import pytest

from mlx_afm.adapters import read_adapter
from mlx_afm.model_folder import ModelFolder


def values(path, base):
    adapter = read_adapter(path, base)
    return {name: np.asarray(tensor.read_values(), np.float32).tobytes() for name, tensor in adapter.weights.items()}


def test_export_writes_a_package_and_checks_it(adapter_forms, model_folder, tmp_path, cli):
    ran = cli("export", "--adapter-path", adapter_forms["folder"], "--name", "tidy_1", "--author", "Me",
              "--output-dir", tmp_path / "out", "--json")  # fmt: skip
    told, package = ran.json, tmp_path / "out" / "tidy_1.fmadapter"
    assert (told["package"], told["ok"], told["fits_device"]) == (str(package), True, False)
    assert [finding["rule"] for finding in told["findings"]] == ["G1"]
    assert {file.name for file in package.iterdir()} == {"metadata.json", "adapter_weights.bin"}
    metadata = json.loads((package / "metadata.json").read_text())
    assert (metadata["adapterIdentifier"], metadata["author"]) == ("fmadapter-tidy_1-9799725", "Me")
    base = ModelFolder(model_folder).config
    assert values(package, base) == values(adapter_forms["folder"], base)
    assert "Signature of toolkit 26.0.0" in ran.err


def test_export_again_replaces_the_package(adapter_forms, tmp_path, cli):
    for author in ("first", "second"):
        ran = cli("export", "--adapter-path", adapter_forms["fmadapter"], "--name", "box", "--output-dir", tmp_path,
                  "--author", author)  # fmt: skip
        assert ran.code == 0
    assert json.loads((tmp_path / "box.fmadapter" / "metadata.json").read_text())["author"] == "second"


def test_adapter_convert_goes_round_without_loss(adapter_forms, model_folder, tmp_path, cli):
    base = ModelFolder(model_folder).config
    wanted, source = values(adapter_forms["folder"], base), adapter_forms["folder"]
    for name in ("one/adapter.pt", "b.fmadapter", "c", "d.pt", "e"):
        model = ("--model", model_folder) if source.suffix == ".pt" else ()
        told = cli("adapter", "convert", source, tmp_path / name, *model, "--json").json
        assert told == {"adapter": str(tmp_path / name)}
        source = tmp_path / name
        assert values(source, base) == wanted
    assert (tmp_path / "one" / "adapter.pt").read_bytes() == adapter_forms["pt"].read_bytes()


def test_fused_says_what_the_adapter_says(adapter_forms, model_folder, tmp_path, cli, say):
    fused = tmp_path / "fused"
    told = cli(
        "fuse", "--model", model_folder, "--adapter-path", adapter_forms["pt"], "--save-path", fused, "--json"
    ).json
    assert told["folder"] == str(fused)
    assert say(model=fused) == say("--adapter-path", adapter_forms["pt"])
    look = cli("inspect", fused, "--json").json
    assert (look["base_adapter"], look["toolkit_config"], look["tokenizer"]) == (False, False, True)


def test_check_passes_a_good_package(adapter_forms, cli):
    ran = cli("check", adapter_forms["fmadapter"])
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[-1] == f"{adapter_forms['fmadapter']}: OK as a file, but not for a device"
    told = cli("check", adapter_forms["fmadapter"], "--json").json
    assert told["ok"] is True
    assert told["geometry"]["hidden"] == 96


def test_check_can_ask_for_a_signature(adapter_forms, cli):
    assert cli("check", adapter_forms["fmadapter"], "--signature", "9799725").code == 0
    ran = cli("check", adapter_forms["fmadapter"], "--signature", "0123456")
    assert ran.code == 3
    assert "FAIL M6" in ran.out
    assert ran.out.splitlines()[-1].endswith("INVALID, broken rules M6")


@pytest.mark.parametrize("as_json", [False, True])
def test_check_lists_every_broken_rule_and_exits_3(as_json, adapter_forms, copy_of, edit_json, cli):
    package = copy_of(adapter_forms["fmadapter"])
    edit_json(package / "metadata.json", baseModelSignature="xyz", adapterIdentifier="fmadapter-a-b-c")
    weights = package / "adapter_weights.bin"
    weights.write_bytes(weights.read_bytes()[:-64])
    ran = cli("check", package, *(["--json"] if as_json else []))
    assert (ran.code, ran.err) == (3, "")
    broken, following = {"M5", "M7", "adapter-C9"}, {"A1", "A7"}
    if as_json:
        told = json.loads(ran.out)
        assert told["ok"] is False
        failed = {finding["rule"]: finding["cause"] for finding in told["findings"] if finding["severity"] == "fail"}
        assert failed == {**dict.fromkeys(broken, ""), **dict.fromkeys(following, "adapter-C9")}
        assert set(told["broken"]) == broken
        assert {finding["file"] for finding in told["findings"]} <= {"metadata.json", "adapter_weights.bin", None}
    else:
        assert ran.out.splitlines()[-1].endswith("INVALID, broken rules M5 M7 adapter-C9")
        assert all(f"FAIL {rule} " in ran.out for rule in broken | following)
        assert ran.out.count("(follows from adapter-C9)") == len(following)


def test_export_tells_what_it_did(adapter_forms, model_folder, tmp_path, copy_of, edit_json, cli):
    folder = copy_of(adapter_forms["folder"])
    edit_json(folder / "adapter_config.json", lora_parameters={"rank": 32, "scale": 1.0, "dropout": 0.0})
    (tmp_path / "more.json").write_text('{"stage": {"beta": 2}, "team": "file"}')
    ran = cli("export", "--adapter-path", folder, "--name", "box", "--output-dir", tmp_path / "out", "--json",
              "--model", model_folder, "--license", "MIT", "--reference-answers", "--prompt", "copy abc",
              "--creator-defined", tmp_path / "more.json", "--creator-defined", "team=me=you")  # fmt: skip
    told = ran.json
    assert told["form"]["scale"] == 1.0
    assert told["rounding"]["max_error"] == 0, "twice a float16 is a float16"
    assert told["logits"]["same_choice"] == 1
    assert told["reference_answers"] == str(tmp_path / "out" / "box.reference_answers.json")
    for text in (
        "scale 1 folded into B (times 2)",
        "rounding to float16: 0 at most",
        "logits change by",
        "box.reference_answers.json",
    ):
        assert text in ran.err
    creator = json.loads((tmp_path / "out" / "box.fmadapter" / "metadata.json").read_text())["creatorDefined"]
    assert creator["stage"] == {"beta": 2}
    assert creator["team"] == "me=you"


def test_export_without_comparing(adapter_forms, model_folder, tmp_path, cli):
    told = cli("export", "--adapter-path", adapter_forms["pt"], "--name", "box", "--output-dir", tmp_path, "--json",
               "--model", model_folder, "--no-compare").json  # fmt: skip
    assert (told["logits"], told["reference_answers"]) == (None, None)


@pytest.mark.parametrize("given", ["nothing-there.json", "{folder}/list.json", "=x"])
def test_creator_defined_that_cannot_be_read(given, adapter_forms, tmp_path, cli):
    (tmp_path / "list.json").write_text("[]")
    ran = cli("export", "--adapter-path", adapter_forms["folder"], "--name", "box", "--output-dir", tmp_path / "out",
              "--creator-defined", given.format(folder=tmp_path))  # fmt: skip
    assert (ran.code, ran.out) == (2, "")
    assert "--creator-defined" in ran.err
    assert not (tmp_path / "out").exists()


def test_check_compares_with_an_adapter(adapter_forms, model_folder, copy_of, cli):
    package, model = adapter_forms["fmadapter"], ("--model", model_folder)
    for form in ("folder", "pt", "fmadapter"):
        assert cli("check", package, "--expect", adapter_forms[form], *model, "--byte-exact").code == 0
    damaged = copy_of(package)
    content = bytearray((damaged / "adapter_weights.bin").read_bytes())
    content[128] ^= 1
    (damaged / "adapter_weights.bin").write_bytes(content)
    ran = cli("check", damaged, "--expect", adapter_forms["folder"])
    assert ran.code == 3
    assert ran.out.splitlines()[-1].endswith("INVALID, broken rules E3")
    assert "record 0 (layers.segment_0.layer_0.attention.qkv_transform" in ran.out
