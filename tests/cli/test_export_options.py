"""Draft pair and asset pack on `mlx-afm export`, and `mlx-afm adapter repair-manifest`."""

import json
import shlex

import pytest

from draft_fixtures import PROGRAM, write_draft_assets
from mlx_afm.formats.blob import read_blobs
from mlx_afm.formats.fmadapter import PUBLIC_SIGNATURE


@pytest.fixture
def toolkit(tmp_path):
    """A toolkit's folder as far as packages need it: draft assets, and the signature."""
    assets = write_draft_assets(tmp_path / "toolkit" / "assets")
    (tmp_path / "toolkit" / "export").mkdir()
    (tmp_path / "toolkit" / "export" / "constants.py").write_text(f'SIGNATURE = "{PUBLIC_SIGNATURE}"\n')
    return assets


@pytest.fixture
def arguments(adapter_forms, tmp_path):
    return ["export", "--adapter-path", adapter_forms["folder"], "--name", "box", "--output-dir", tmp_path / "out"]


def test_the_draft_pair_goes_into_the_package(toolkit, arguments, tmp_path, cli):
    root, package = tmp_path / "toolkit", tmp_path / "out" / "box.fmadapter"
    told = cli(*arguments, "--toolkit", root, "--draft-checkpoint", toolkit.checkpoint, "--json").json
    assert told["ok"] is True
    assert {file.name for file in package.iterdir()} == {
        "metadata.json", "adapter_weights.bin", "draft.mil", "draft_weights.bin",
    }  # fmt: skip
    assert (package / "draft.mil").read_bytes() == PROGRAM
    assert cli("check", package, "--toolkit", root).code == 0
    after, before = (package / "draft_weights.bin").read_bytes(), toolkit.template
    assert len(after) == len(before)
    changed = [i for i in range(len(after)) if after[i] != before[i]]
    inside = {
        at for blob in read_blobs(package / "draft_weights.bin") for at in range(blob.offset, blob.offset + blob.nbytes)
    }
    assert changed
    assert set(changed) <= inside


def test_a_draft_that_does_not_fit_leaves_nothing(toolkit, arguments, tmp_path, expect_refusal):
    toolkit.write_spec(lambda d: d["weights_mapping"].pop("decoder.output_norm.scale"))
    options = ["--toolkit", tmp_path / "toolkit", "--draft-checkpoint", toolkit.checkpoint]
    expect_refusal(*arguments, *options, says=["decoder.output_norm.scale: the spec has no place for it"])


def test_values_that_cannot_be_stored_leave_nothing(toolkit, arguments, tmp_path, cli):
    state = {name: values.copy() for name, values in toolkit.state.items()}
    state["output_norm.weight"][0] = float("nan")
    toolkit.write_state(state)
    ran = cli(*arguments, "--toolkit", tmp_path / "toolkit", "--draft-checkpoint", toolkit.checkpoint)
    assert ran.code == 1
    assert "decoder.output_norm.scale: values that are infinite or not numbers" in ran.err
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_surplus_is_left_out_on_request_and_said(toolkit, arguments, tmp_path, cli):
    toolkit.write_spec(lambda d: d["weights_mapping"].pop("decoder.output_norm.scale"))
    ran = cli(*arguments, "--toolkit", tmp_path / "toolkit", "--draft-checkpoint", toolkit.checkpoint,
              "--ignore-surplus")  # fmt: skip
    assert ran.code == 0
    assert "draft tensors left out: decoder.output_norm.scale" in ran.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--draft-checkpoint", "x.pt"], "--draft-checkpoint needs --toolkit"),
        (["--platforms", "iOS"], "need --asset-pack"),
        (["--download-policy", "PREFETCH"], "need --asset-pack"),
    ],
)
def test_options_that_need_another_are_a_usage_error(options, says, arguments, tmp_path, cli):
    ran = cli(*arguments, *options)
    assert ran.code == 2
    assert says in ran.err
    assert not (tmp_path / "out").exists()


def test_a_pack_is_described_by_manifest_and_command(arguments, tmp_path, cli):
    ran = cli(*arguments, "--asset-pack", "--platforms", "iOS, macOS", "--download-policy", "prefetch",
              "--installation-event-type", "FIRST_INSTALLTION", "--json")  # fmt: skip
    told, package = ran.json["asset_pack"], tmp_path / "out" / "box.fmadapter"
    assert told["id"] == f"fmadapter-box-{PUBLIC_SIGNATURE[:7]}"
    assert told["command"] in ran.err
    assert shlex.split(told["command"]) == [
        "xcrun", "ba-package", "foundation-models", "package", "--adapter-path", str(package),
        "--asset-pack-id", told["id"], "--output-path", str(tmp_path / "out" / "box.aar"),
        "--platforms", "iOS", "macOS", "--prefetch", "--installation-event-types", "firstInstallation",
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "box.manifest.json").read_text())
    assert manifest["assetPackID"] == told["id"]
    assert manifest["downloadPolicy"] == {"prefetch": {"installationEventTypes": ["firstInstallation"]}}


def test_a_pack_that_cannot_be_made_stops_the_export(arguments, tmp_path, cli):
    ran = cli(*arguments, "--asset-pack", "--platforms", "watchOS")
    assert ran.code == 2
    assert "watchOS" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_manifest_is_repaired_once(tmp_path, cli):
    path = tmp_path / "manifest.json"
    path.write_text('{"assetPackID": "x", "downloadPolicy": {"onDemand": null}}')
    assert cli("adapter", "repair-manifest", path, "--json").json["repaired"] is True
    assert json.loads(path.read_text())["downloadPolicy"] == {"onDemand": {}}
    assert cli("adapter", "repair-manifest", path, "--json").json["repaired"] is False
