"""Every option of every command is used or refused.

`PROBES` has a line of each option that is neither a path nor a number: either what refuses it, or that it changes what
the command does. Paths are tried with a file that is not there, numbers with one that no option takes.
"""

import json
from dataclasses import dataclass

import click
import pytest

from command_lines import leaves, shortest_lines
from mlx_afm.quant import QuantConfig
from mlx_afm.workflows.convert import convert
from mlx_afm_cli.main import group

NOWHERE = "/nowhere/at-all"
TYPES_OF_PATH = ("PathType",)


COMMANDS = leaves(group)
OUTPUTS = {  # paths that are written: what is there afterwards
    "convert": {"target"},
    "lora": {"adapter_path"},
    "recover": {"adapter_path"},
    "plot": {"output"},
    "fuse": {"save_path"},
    "generate": {"output", "prompt_cache_file"},
    "export": {"output_dir"},
    "data check": {"fix"},
    "data split": {"out"},
    "toolkit export_fmadapter": {"output_dir"},
    "toolkit produce_asset_pack": {"output_path"},
    "toolkit train_adapter": {"checkpoint_dir"},
    "demo": {"out"},
}


@dataclass(frozen=True)
class World:
    """Inputs, and the shortest line of each command that works, or nearly: `lora` and `serve` do not come to run."""

    base: dict[str, list[str]]
    places: dict[str, object]

    def line(self, command, *more):
        more = [str(self.places.get(text, text)) for text in more]
        return [*command.split(), *self.base[command], *more]


@pytest.fixture(scope="module")
def world(toolkit_folder, model_folder, adapter_forms, data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    codes = convert(model_folder, folder / "codes", quantization=QuantConfig()).folder
    base = shortest_lines(
        folder,
        {
            "model": model_folder,
            "codes": codes,
            "data": data_folder,
            "toolkit": toolkit_folder,
            **{f"adapter {form}": path for form, path in adapter_forms.items()},
        },
    )
    assert set(base) == set(COMMANDS)
    return World(base, {"TOOLKIT": toolkit_folder, "MODEL": model_folder, "ADAPTER": adapter_forms["folder"]})


def _of_kind(*kinds):
    return [
        (name, parameter)
        for name, command in COMMANDS.items()
        for parameter in command.params
        if isinstance(parameter, click.Option) and type(parameter.type).__name__ in kinds and not parameter.count
    ]


def _ids(pairs):
    return [f"{name} {parameter.opts[-1]}" for name, parameter in pairs]


INPUTS = [(name, p) for name, p in _of_kind("PathType") if p.name not in OUTPUTS.get(name, ())]
NUMBERS = _of_kind("IntParamType", "FloatParamType", "IntRange", "FloatRange")
# What an option needs beside it to count; for the rest the shortest line is enough.
BESIDE = {
    ("convert", "calibration_data"): ["-q", "--q-mode", "balanced"],
    ("convert", "calibration_examples"): ["-q", "--calibration-data", "x"],
    ("convert", "q_bits"): ["-q"],
    ("convert", "q_group_size"): ["-q"],
    ("convert", "rank"): ["-q", "--init-adapter", "residual-svd"],
    ("convert", "scale"): ["-q", "--init-adapter", "residual-svd"],
    ("convert", "init_rounds"): ["-q", "--init-adapter", "residual-svd"],
    ("export", "draft_checkpoint"): ["--toolkit", "TOOLKIT"],
    ("toolkit export_fmadapter", "draft_checkpoint"): ["--assets", "TOOLKIT"],
    ("estimate", "data"): ["--model", "MODEL"],
    ("check", "model"): ["--expect", "ADAPTER"],
    ("generate", "batch_size"): ["--prompt", "/nowhere/q.jsonl", "--output", "/nowhere/a.jsonl"],
    ("lora", "sample_tokens"): ["--sample-prompt", "x"],
    ("recover", "sample_tokens"): ["--sample-prompt", "x"],
}


@pytest.mark.parametrize(("command", "option"), INPUTS, ids=_ids(INPUTS))
def test_a_file_that_is_not_there_is_refused(command, option, world, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_AFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("asyncio.start_server", None)
    beside = BESIDE.get((command, option.name), ())
    data = command.startswith("data ") and option.name == "data"
    line = [*command.split(), "--data", NOWHERE, *world.base[command][1:]] if data else None
    ran = cli(*(line or world.line(command, *beside, option.opts[-1], NOWHERE)))
    if command == "toolkit generate" and f"{option.opts[-1]}: no effect here" in ran.err:
        return  # an option of the toolkit's that is told to have none
    assert ran.code in (1, 2), (ran.out, ran.err)
    # What a draft checkpoint belongs to is checked first, and the demo's toolkit has no draft assets.
    assert "nowhere" in ran.err or (option.name == "draft_checkpoint" and "draft.mil" in ran.err), ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(("command", "option"), NUMBERS, ids=_ids(NUMBERS))
def test_a_number_that_no_option_takes_is_refused(command, option, world, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_AFM_CACHE", str(tmp_path / "cache"))
    beside = BESIDE.get((command, option.name), ())
    ran = cli(*world.line(command, *beside, option.opts[-1], "-7"))
    if command == "toolkit generate" and "no effect here" in ran.err:
        return
    assert ran.code in (1, 2), (ran.out, ran.err)
    assert "-7" in ran.err, ran.err
    assert ran.code == 2, ran.err


# What was ignored without a word -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("check", ["--toolkit", NOWHERE], "no such folder"),
        ("check", ["--model", NOWHERE], "--model: no effect without --expect"),
        ("check", ["--reduce-rank"], "--reduce-rank: no effect without --expect"),
        ("generate", ["--output", "x", "--model", NOWHERE], f"--model: no such file or folder: {NOWHERE}"),
        ("generate", ["--num-draft-tokens", "3"], "--num-draft-tokens: no effect without --draft-model"),
        ("generate", ["--field", "prompt=b"], "--field: no effect without a --prompt that names a .jsonl"),
        ("generate", ["--batch-size", "2"], "--batch-size: no effect"),
        ("generate", ["--dialect", "text"], "--dialect: no effect"),
        ("chat", ["--num-draft-tokens", "3"], "--num-draft-tokens: no effect without --draft-model"),
        ("data check", ["--field", "a=b"], "field: expected one of messages"),
        ("data check", ["--field", "promt=b"], "is it prompt?"),
        ("data check", ["--field", "prompt=a", "--field", "prompt=b"], "each name once"),
        ("data stats", ["--overflow", "drop"], "--overflow: no effect here"),
        ("data render", ["--line", "1", "-n", "3"], "no effect with --line"),
        ("lora", ["--iters", "3", "--epochs", "2"], "iters and epochs exclude each other"),
        ("lora", ["--fine-tune-type", "full", "--rank", "8"], "rank: only lora and dora have it"),
        ("lora", ["--fine-tune-type", "qat", "--alpha", "8"], "alpha: only lora and dora have it"),
        ("lora", ["--sample-tokens", "8"], "sample_tokens has no effect without sample_prompt"),
        ("lora", ["--project-name", "x"], "project_name has no effect without report_to"),
        ("estimate", ["--memory", "0"], "expected at least 1 byte"),
        ("estimate", ["--table", "--memory", "16GB"], "--memory: no effect with --table"),
        ("estimate", ["--data", "x", "--model", "y", "--trained-share", "0.5"], "--trained-share: no effect"),
        ("serve", ["--admin-root", NOWHERE], f"admin_roots: expected folders, found {NOWHERE}"),
        ("serve", ["--adapter", f"a={NOWHERE}"], f"no such file or folder: {NOWHERE}"),
        ("export", ["--prompt", "x"], "--prompt: no effect without --model"),
        ("export", ["--no-compare"], "--compare: no effect without --model"),
        ("export", ["--ignore-surplus"], "--ignore-surplus: no effect without --draft-checkpoint"),
        ("export", ["--signature", "0" * 40, "--toolkit", "x"], "--toolkit: no effect with --signature"),
        ("convert", ["--config", "x.json"], "config is for a .pt of the toolkit"),
        ("fuse", ["--dequantize"], "nothing to dequantize: the model is dense"),
        ("toolkit export_fmadapter", ["-v", "-q"], "no effect with --verbose"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_was_ignored_is_refused(command, options, says, world, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = cli(*world.line(command, *options))
    assert ran.code in (1, 2), (ran.out, ran.err)
    assert says in ran.err
    assert ran.out == ""


def test_options_of_training_without_train(world, cli, model_folder, data_folder, adapter_forms):
    line = ["lora", "--test", "--model", model_folder, "--data", data_folder, "--adapter-path", adapter_forms["folder"]]
    ran = cli(*line, "--iters", 3, "--rank", 8)
    assert ran.code == 2
    assert "--iters, --rank: no effect on --test alone" in ran.err
    assert cli(*line, "--batch-size", 2, "--no-cache").code == 0


def test_sampling_without_temperature_is_told(world, cli):
    ran = cli(*world.line("generate", "--top-p", "0.5", "-m", 1))
    assert ran.code == 0
    assert "--top-p: no effect with --temp 0" in ran.err
    assert "no effect" not in cli(*world.line("generate", "--top-p", "0.5", "--temp", 1, "-m", 1)).err


def test_an_option_is_suggested_only_if_it_is_a_misspelling(cli):
    assert "--val-batches" not in cli("lora", "--test-batches", 1).err
    assert "--sample-prompt" not in cli("lora", "--mask-prompt").err
    assert "--learning-rate" in cli("lora", "--lerning-rate", 1).err


@pytest.mark.parametrize(
    "command", ["inspect", "plot", "check", "data check", "data stats", "data render", "estimate", "generate"]
)
def test_json_is_one_object(command, world, cli):
    ran = cli(*world.line(command, "--json"))
    assert ran.code in (0, 3)
    assert isinstance(json.loads(ran.out), dict)
