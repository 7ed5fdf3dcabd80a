"""mlx-afm toolkit: the toolkit's own commands, options and places."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from draft_fixtures import PROGRAM, write_draft_assets
from mlx_afm.adapters import read_adapter
from mlx_afm.formats.blob import read_blobs
from mlx_afm.formats.fmadapter import PUBLIC_SIGNATURE
from mlx_afm.formats.torch_file import read_torch
from mlx_afm.model_folder import ModelFolder

WRAPPER = Path(__file__).with_name("toolkit_wrapper.sh")
OTHER = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def toolkit(toolkit_folder, data_folder, tmp_path, monkeypatch):
    """The folder of a toolkit, as the current one: assets, and data of twelve and four lines."""
    folder = tmp_path / "toolkit"
    shutil.copytree(toolkit_folder, folder / "assets")
    for name, source, count in (("train.jsonl", "train", 12), ("eval.jsonl", "valid", 4)):
        lines = (data_folder / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLX_AFM_CACHE", str(tmp_path / "cache"))
    for name in ("MLX_AFM_TOOLKIT_ASSETS", "MLX_AFM_TOOLKIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return folder


def converted(dtype):
    """The model that the toolkit's commands converted into the cache."""
    (folder,) = Path("../cache/toolkit").glob(f"*/{dtype}")
    return folder


@pytest.fixture
def adapter(adapter_forms):
    return adapter_forms["pt"]


def train(cli, *options):
    return cli("toolkit", "train_adapter", "--train-data", "train.jsonl", "--checkpoint-dir", "out",
               "--precision", "f32", *options)  # fmt: skip


def test_training_leaves_the_toolkits_checkpoints(toolkit, cli):
    ran = train(cli, "--eval-data", "eval.jsonl", "--epochs", 3, "-lr", "1e-3", "--loss-update-frequency", 1)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[0].split() == ["checkpoint", "out/adapter-final.pt"]
    names = {path.name for path in Path("out").iterdir()}
    assert {name for name in names if name.endswith(".pt")} >= {"adapter-final.pt"}
    assert len([name for name in names if name.startswith("adapter-epoch")]) == 2
    final = read_torch(Path("out/adapter-final.pt"))
    assert {tensor.dtype for tensor in final.values()} == {"float32"}
    assert all("adapters.base_adapter" in name for name in final)
    reference = [name for name in read_torch(Path("assets/base-model.pt")) if "adapter" in name]
    assert list(final) == reference
    assert any(np.any(tensor.read_values()) for name, tensor in final.items() if name.endswith("b_transpose"))
    rates = [line.split()[5] for line in ran.err.splitlines() if line.startswith("step ") and "rate" in line]
    assert [float(rate) for rate in rates[:3]] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3], rel=1e-2)
    assert len(rates) == 9


def test_options_without_meaning_are_named(toolkit, cli):
    ran = train(cli, "--epochs", 1, "--compile-model", "--max-sequence-length", 200, "--fixed-sized-sequences")
    assert ran.code == 0, ran.err
    assert "--compile-model: no effect here" in ran.err
    assert "--fixed-sized-sequences: no effect here" in ran.err
    assert "f32: base and adapter in float32" in ran.err
    assert {path.name for path in Path("out").glob("*.pt")} == {"adapter-final.pt", "adapter-epoch1.pt"}


@pytest.mark.slow
def test_packed_rows_and_a_checkpoint_every_other_epoch(toolkit, cli):
    ran = train(cli, "--epochs", 3, "--pack-sequences", "--max-sequence-length", 200, "--batch-size", 1,
                "--checkpoint-frequency", 2, "--activation-checkpointing")  # fmt: skip
    assert ran.code == 0, ran.err
    assert {path.name for path in Path("out").glob("*.pt")} == {
        "adapter-final.pt", "adapter-epoch2.pt", "adapter-epoch3.pt",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--fixed-sized-sequences"], 2, "needs --max-sequence-length"),
        (["--pack-sequences"], 2, "pack_sequences: expected with max_sequence_length"),
        (["--max-sequence-length", 4096], 2, "expected from 1 to 4095, found 4096"),
        (["--epochs", 0], 2, "epochs: expected at least 1"),
        (["--precision", "f16"], 2, "f16"),
        (["--train_data", "x"], 2, "No such option"),
        (["--eval-data", "none.jsonl"], 1, "none.jsonl: no such file"),
    ],
)
def test_what_the_toolkit_refuses_is_refused(options, code, says, toolkit, cli):
    ran = train(cli, *options)
    assert ran.code == code
    assert says in ran.err
    assert not list(toolkit.rglob("adapter-*.pt"))


def test_without_assets_the_places_are_named(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLX_AFM_TOOLKIT_ASSETS", raising=False)
    ran = cli("toolkit", "generate", "--prompt", "x")
    assert ran.code == 1
    assert "no assets" in ran.err
    assert "--assets FOLDER or $MLX_AFM_TOOLKIT_ASSETS" in ran.err


def test_answers_are_numbered(toolkit, adapter, cli):
    Path("p.jsonl").write_text(
        '[{"role": "user", "content": "sort vido.conf in reverse"}]\n\n'
        '{"messages": [{"role": "user", "content": "x"}]}\n'
    )
    options = ["--precision", "f32", "--temperature", 0, "--max-new-tokens", 6]
    ran = cli("toolkit", "generate", "--prompt", "p.jsonl", "--checkpoint", adapter, *options, "--batch-size", 2,
              "--num_draft_tokens", 5)  # fmt: skip
    assert ran.code == 0, ran.err
    first, second = ran.out.split("Response for prompt ")[1:]
    assert first.startswith("0:\n")
    assert second.startswith("1:\n")
    alone = cli("toolkit", "generate", "--prompt", "sort vido.conf in reverse", "--checkpoint", adapter, *options)
    assert alone.out.split("0:\n")[1].strip() == first.removeprefix("0:\n").strip()
    told = cli("generate", "--model", converted("float32"), "--adapter-path", adapter, "--prompt",
               "sort vido.conf in reverse", "-m", 6, "--json").json  # fmt: skip
    assert told["text"].strip() == first.removeprefix("0:\n").strip()
    assert "--num-draft-tokens: no effect here" in ran.err
    assert "--batch-size: no effect here" in ran.err
    assert "converting" in ran.err
    assert "converting" not in alone.err


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("3\n", "line 1: expected a list of messages"),
        ("[]\n", "expected a list of messages"),
        ("{bad\n", "line 1: Expecting"),
        ("[" * 100_000, "line 1: "),
        ('[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]', "one that is answered"),
        ("", "no conversation"),
        ("3\n4\n", "lines that are no conversations"),
    ],
)
def test_wrong_prompts_are_one_error(lines, says, toolkit, cli):
    Path("p.jsonl").write_text(lines)
    ran = cli("toolkit", "generate", "--prompt", "p.jsonl", "--precision", "f32")
    assert ran.code == 1
    assert says in ran.err
    assert ran.out == ""


def test_draft_training_is_refused_with_the_reason(cli):
    ran = cli("toolkit", "train_draft_model", "--train-data", "x", "--checkpoint", "y", "-lr", "1e-3")
    assert ran.code == 1
    assert "draft models are not trained with the toolkit's options" in ran.err


def test_export_takes_the_toolkits_options(toolkit, adapter, model_folder, cli):
    (toolkit / "export").mkdir()
    (toolkit / "export" / "constants.py").write_text(f'BASE_SIGNATURE = "{OTHER}"\n')
    arguments = ["-o", "out", "-n", "tidy", "-c", adapter, "--author", "Me", "--description", "Text"]
    ran = cli("toolkit", "export_fmadapter", *arguments)
    assert ran.code == 0, ran.err
    metadata = json.loads(Path("out/tidy.fmadapter/metadata.json").read_text())
    assert (metadata["author"], metadata["description"]) == ("Me", "Text")
    assert metadata["adapterIdentifier"] == "fmadapter-tidy-0123456"
    base = ModelFolder(model_folder).config
    wanted, found = read_adapter(adapter, base), read_adapter(Path("out/tidy.fmadapter"), base)
    for name, tensor in wanted.weights.items():
        np.testing.assert_array_equal(found.weights[name].read_values(), tensor.read_values())
    again = cli("toolkit", "export_fmadapter", *arguments)
    assert "replacing out/tidy.fmadapter" in again.err
    quiet = cli("toolkit", "export_fmadapter", *arguments, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_a_hyphen_in_the_name_is_refused_before_anything(toolkit, adapter, cli):
    ran = cli("toolkit", "export_fmadapter", "-o", "out", "-n", "my-adapter", "-c", adapter)
    assert ran.code == 2
    assert "my_adapter" in ran.err
    assert not Path("out").exists()


def test_export_with_a_draft_checkpoint(toolkit, adapter, cli):
    assets = write_draft_assets(toolkit / "assets")
    checkpoint = toolkit / "draft-model-final.pt"
    assets.checkpoint.rename(checkpoint)
    ran = cli("toolkit", "export_fmadapter", "-o", "out", "-n", "tidy", "-c", adapter, "-d", checkpoint)
    assert ran.code == 0, ran.err
    package = Path("out/tidy.fmadapter")
    assert {path.name for path in package.iterdir()} == {
        "metadata.json", "adapter_weights.bin", "draft.mil", "draft_weights.bin",
    }  # fmt: skip
    assert (package / "draft.mil").read_bytes() == PROGRAM
    assert (package / "draft_weights.bin").read_bytes() != assets.template
    assert cli("check", package, "--toolkit", toolkit).code == 0


def test_a_pack_is_made_by_xcrun(toolkit, adapter_forms, tmp_path, monkeypatch, cli):
    tool = tmp_path / "bin" / "xcrun"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$0.arguments"\nexit ${XCRUN_FAILS:-0}\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    package = adapter_forms["fmadapter"]
    arguments = ["--fmadapter-path", package, "--output-path", "x.aar", "--platforms", "iOS,macOS",
                 "--download-policy", "PREFETCH", "--installation-event-type", "FIRST_INSTALLTION"]  # fmt: skip
    without = cli("toolkit", "produce_asset_pack", *arguments)
    assert without.code == 1
    assert "xcrun ba-package foundation-models package --adapter-path" in without.err
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    ran = cli("toolkit", "produce_asset_pack", *arguments)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[0].split() == ["archive", str(toolkit / "x.aar")]
    assert (tmp_path / "bin" / "xcrun.arguments").read_text().splitlines() == [
        "ba-package", "foundation-models", "package", "--adapter-path", str(package), "--asset-pack-id",
        f"fmadapter-box-{PUBLIC_SIGNATURE[:7]}", "--output-path", str(toolkit / "x.aar"), "--platforms", "iOS", "macOS",
        "--prefetch", "--installation-event-types", "firstInstallation",
    ]  # fmt: skip
    monkeypatch.setenv("XCRUN_FAILS", "3")
    failed = cli("toolkit", "produce_asset_pack", *arguments)
    assert failed.code == 1
    assert "ba-package failed (found exit code 3)" in failed.err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sh") is None, reason="a shell is missing")
def test_a_script_written_for_the_toolkit_runs_to_a_checked_package(toolkit, cli):
    program = f"{sys.executable} -m mlx_afm toolkit "
    done = subprocess.run(
        ["sh", str(WRAPPER), "train.jsonl", "eval.jsonl", "out"],
        env={**os.environ, "EXAMPLES": program, "EXPORT": program},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "bf16: treated as bf16-mixed" in done.stderr
    assert Path("out/answers.txt").read_text().count("Response for prompt ") == 2
    package = Path("out/my_adapter.fmadapter")
    ran = cli("check", package, "--expect", "out/checkpoints/adapter-final.pt", "--model", converted("bfloat16"))
    assert ran.code == 0, ran.out
    assert json.loads((package / "metadata.json").read_text())["author"] == "A developer"
    blobs = read_blobs(package / "adapter_weights.bin")
    assert any(np.any(blob.read()) for blob in blobs[1::2])
