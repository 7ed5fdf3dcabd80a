"""The commands of mlx-afm, and the shortest line of each that works."""

import json
import shutil

import click


def leaves(command, path=()):
    """Every command that runs something, by its name in words."""
    if not isinstance(command, click.Group):
        return {" ".join(path): command}
    names = command.list_commands(click.Context(command))
    return {k: v for name in names for k, v in leaves(command.get_command(None, name), (*path, name)).items()}


def shortest_lines(folder, inputs):
    """Arguments of each command by its name; `recover`, `serve` and `demo` stop at something that is checked late.

    Args:
        folder: for small inputs made here, and for what the commands write.
        inputs: model, codes, data, toolkit, and the adapter in its three forms.
    """
    given = {name: str(path) for name, path in inputs.items()}
    shutil.copy(f"{given['data']}/train.jsonl", folder / "all.jsonl")
    (folder / "manifest.json").write_text(json.dumps({"assetPackID": "x", "downloadPolicy": {"onDemand": None}}))
    (folder / "log").mkdir()
    (folder / "log" / "metrics.jsonl").write_text('{"event": "train", "step": 1, "loss": 1.0}\n')
    model, adapter, rows = ["--model", given["model"]], given["adapter folder"], str(folder / "all.jsonl")
    training = ["--data", given["data"], "--adapter-path", str(folder / "out")]
    return {
        "convert": ["--hf-path", given["model"], "--mlx-path", str(folder / "new")],
        "lora": ["--train", *model, *training],
        "recover": ["--model", given["codes"], *training, "--loss", "next-token"],
        "draft": [*model, "--draft-model", given["model"], "--data", given["data"], "--output", str(folder / "draft")],
        "estimate": [],
        "plot": [str(folder / "log")],
        "fuse": [*model, "--adapter-path", adapter, "--save-path", str(folder / "fused")],
        "generate": [*model, "--prompt", "hello"],
        "chat": model,
        "serve": model,
        "export": ["--adapter-path", adapter, "--name", "box", "--output-dir", str(folder / "package")],
        "adapter convert": [adapter, str(folder / "x.pt")],
        "adapter repair-manifest": [str(folder / "manifest.json")],
        "check": [given["adapter fmadapter"]],
        "inspect": [given["model"]],
        "data check": [given["data"]],
        "data convert": [rows, str(folder / "out.csv"), "--to", "prompt-completion"],
        "data render": [given["data"], *model],
        "data split": [rows, "--out", str(folder / "split")],
        "data stats": [given["data"], *model],
        "toolkit export_fmadapter": [
            *("-o", str(folder / "p"), "-n", "box", "-c", given["adapter pt"]),
            *("--assets", given["toolkit"]),
        ],
        "toolkit generate": ["--prompt", "x", "--assets", given["toolkit"]],
        "toolkit produce_asset_pack": ["--fmadapter-path", given["adapter fmadapter"]],
        "toolkit train_adapter": [
            "--train-data",
            rows,
            "--checkpoint-dir",
            str(folder / "c"),
            "--assets",
            given["toolkit"],
        ],
        "toolkit train_draft_model": [],
        "cache list": [],
        "cache clear": [],
        "demo": ["--out", str(folder)],
    }
