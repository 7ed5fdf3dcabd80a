"""Every option of every command is used or refused.

`PROBES` has a line of each option that is neither a path nor a number: either what refuses it, or that it changes what
the command does. Paths are tried with a file that is not there, numbers with one that no option takes.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

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
    "draft": {"output"},
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
    ("draft", "sample_tokens"): ["--sample-prompt", "x"],
}


@pytest.mark.parametrize(("command", "option"), INPUTS, ids=_ids(INPUTS))
def test_a_file_that_is_not_there_is_refused(command, option, world, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_AFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.getaddrinfo", None)
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
        ("generate", ["--data-format", "text"], "--data-format: no effect"),
        ("chat", ["--num-draft-tokens", "3"], "--num-draft-tokens: no effect without --draft-model"),
        ("data check", ["--field", "a=b"], "field: expected one of messages"),
        ("data check", ["--field", "promt=b"], "is it prompt?"),
        ("data check", ["--field", "prompt=a", "--field", "prompt=b"], "each name once"),
        ("data stats", ["--truncation", "drop"], "--truncation: no effect here"),
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


# Texts, choices and switches -------------------------------------------------------------------------

# A text that the option does not take, and what the error says.
WRONG = {
    "name": ("a-b", "not a name that devices accept"),
    "adapter_name": ("a-b", "not a name that devices accept"),
    "field": ("a=b", "field: expected one of"),
    "transform": ("gone:f", "no such transform"),
    "targets": ("z", "targets: expected some of"),
    "layers": ("z", "layers: "),
    "report_to": ("z", "unknown report"),
    "base": ("3-bit", "unknown form of base weights"),
    "memory": ("lots", "not a size"),
    "platforms": ("z", "platforms: expected some of"),
    "download_policy": ("z", "download policy: expected one of"),
    "installation_event_type": ("z", "installation event type: expected some of"),
    "signature": ("12", "40 lower-case hex digits"),
    "creator_defined": ("x", "neither K=V nor a JSON file"),
    "columns": ("a", "only tables have columns"),
    "named": ("x", "expected NAME=PATH"),
    "host": ("0.0.0.0", "expected an api_key"),
    "api_key": ("short", "api_key: expected at least 8"),
    "adapter_memory": ("x", "not a size"),
    "prefix_cache": ("x", "not a size"),
    "max_body": ("x", "not a size"),
    "num_draft_tokens": ("0", "expected 1 to 100"),
    "stop": ("", "stop: expected texts that are not empty"),
}
WRONG_HERE = {
    ("check", "signature"): None,
    ("generate", "transform"): ("gone:f", "--transform: no effect"),
    ("generate", "field"): ("a=b", "field: expected one of"),
    ("serve", "model"): (NOWHERE, "nowhere"),
    ("serve", "model_id"): None,
    ("estimate", "transform"): None,
    ("toolkit generate", "num_draft_tokens"): None,
    ("plot", "output"): ("x.gif", "unknown kind of picture"),
}
ASIDE = {("export", name): ["--asset-pack"] for name in ("platforms", "download_policy", "installation_event_type")}
TEXTS = [
    (name, parameter)
    for name, command in COMMANDS.items()
    for parameter in command.params
    if isinstance(parameter, click.Option) and not parameter.is_flag
    if WRONG_HERE.get((name, parameter.name), WRONG.get(parameter.name)) is not None
]


@pytest.mark.parametrize(("command", "option"), TEXTS, ids=_ids(TEXTS))
def test_a_text_that_the_option_does_not_take_is_refused(command, option, world, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_AFM_CACHE", str(tmp_path / "cache"))
    value, says = WRONG_HERE.get((command, option.name), WRONG.get(option.name))
    beside = ["--draft-model", "MODEL"] if option.name == "num_draft_tokens" else ASIDE.get((command, option.name), [])
    ran = cli(*world.line(command, *beside, option.opts[0], value))
    assert ran.code in (1, 2), (ran.out, ran.err)
    assert says in ran.err


# Options that change the result of the shortest line, with what they need beside them.
CHANGES = {
    "convert": {
        "to": ["torch"],
        "dtype": ["bfloat16"],
        "quantize": [],
        "verify": [],
        "q_mode": ["mxfp8", "-q"],
        "q_recipe": ["mixed_2_6", "-q"],
        "init_adapter": ["weight-svd", "-q"],
    },
    "estimate": {
        "table": [],
        "grad_checkpoint": [],
        "optimizer": ["sgd"],
        "fine_tune_type": ["full"],
    },
    "generate": {"system_prompt": ["Be brief."], "no_system_prompt": [], "verbose": ["true"]},
    "export": {
        "author": ["x"],
        "description": ["x"],
        "license": ["x"],
        "asset_pack": [],
        "reference_answers": ["--model", "MODEL"],
    },
    "check": {"signature": ["0" * 7]},
    "data check": {
        "data_format": ["text"],
        "system_prompt": ["x", "--model", "MODEL"],
        "no_system_prompt": ["--model", "MODEL"],
        "truncation": ["drop", "--model", "MODEL", "--max-seq-length", "30"],
    },
    "data convert": {"to": ["instruction"], "data_format": ["text"]},
    "data render": {
        "split": ["valid"],
        "ids": [],
        "data_format": ["text"],
        "truncation": ["drop", "--max-seq-length", "30"],
    },
    "data split": {"data_format": ["text"]},
    "data stats": {
        "data_format": ["text"],
    },
    "toolkit export_fmadapter": {"author": ["x"], "description": ["x"], "verbose": [], "quiet": []},
    "toolkit generate": {"precision": ["f32"], "compile_model": []},
    "lora": {
        "fine_tune_type": ["dora"],
        "schedule": ["linear"],
        "optimizer": ["sgd"],
        "no_decay": ["lora_b"],
        "sample_prompt": ["x"],
        "grad_checkpoint": [],
        "use_rslora": ["--alpha", "8"],
        "test": [],
        "system_prompt": ["x"],
        "no_system_prompt": [],
        "no_cache": [],
        "data_format": ["text"],
        "truncation": ["drop", "--max-seq-length", "60"],
    },
    "recover": {
        "schedule": ["linear"],
        "optimizer": ["sgd"],
        "no_decay": ["lora_b"],
        "sample_prompt": ["x"],
        "grad_checkpoint": [],
        "use_rslora": ["--alpha", "8"],
        "system_prompt": ["x"],
        "no_system_prompt": [],
        "no_cache": [],
        "data_format": ["text"],
        "truncation": ["drop", "--max-seq-length", "60"],
        "into_base": [],
        "loss": ["distill", "--teacher", "MODEL"],
    },
}
TRIED = [(command, option) for command, options in CHANGES.items() for option in options]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), TRIED, ids=[" ".join(pair) for pair in TRIED])
def test_an_option_changes_what_the_command_does(command, option, world, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (parameter,) = [p for p in COMMANDS[command].params if p.name == option]
    short = ["--iters", "2", "--batch-size", "2", "--steps-per-report", "1"] if command in ("lora", "recover") else []
    short += ["-m", "3"] if command == "generate" else []
    results = []
    for number, more in enumerate([[], [parameter.opts[0], *CHANGES[command][option]]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.setenv("MLX_AFM_CACHE", str(folder / "cache"))
        line = [_moved(word, world, folder) for word in world.line(command, *short, *more)]
        ran = cli(*line)
        said = re.sub(r"[\d.,:]+ ?(tokens|MB|per second|GB|ETA|seconds)\S*|ETA \S+|, \d:\d\d", "", ran.out + ran.err)
        files = {str(path.relative_to(folder)): _plain(path) for path in folder.rglob("*") if path.is_file()}
        results.append((ran.code, said.replace(str(folder), ""), files))
    assert results[0] != results[1]


def _plain(path):
    """A file's bytes, without times."""
    return re.sub(rb'"(tokens_per_second|seconds\w*|peak_memory_bytes)": [\d.e+-]+', b"", path.read_bytes())


def _moved(word, world, folder):
    """A target of the shortest lines, in a folder of its own; models that the command changes are copied."""
    if word == world.base["recover"][1] and not (folder / "codes").exists():
        shutil.copytree(word, folder / "codes")
    if word == world.base["recover"][1]:
        return str(folder / "codes")
    place = Path(world.base["convert"][3]).parent
    target = Path(word)
    return str(folder / target.name) if target.parent == place and not target.exists() else word


LORAS = {parameter.name for parameter in COMMANDS["lora"].params}

# Options of `lora` that `estimate` takes, so that a line can be reused, and only checks; its help says so.
CHECKED_ONLY = {
    "use_rslora",
    "transform",
    "no_cache",
    "ignore_memory",
    "frozen_cache",
    "data_format",
    "system_prompt",
    "no_system_prompt",
    "truncation",
    "schedule",
    "no_decay",
}


def test_every_option_is_tried_in_one_of_these_ways():
    tried = {(name, p.name) for name, p in (*INPUTS, *NUMBERS, *TEXTS)} | set(TRIED)
    tried |= {(command, name) for command, names in OUTPUTS.items() for name in names}
    elsewhere = {  # `test_what_was_ignored_is_refused`, and the tests of each command
        ("check", "byte_exact"), ("data render", "system_prompt"), ("data stats", "system_prompt"),
            ("data render", "no_system_prompt"), ("data stats", "no_system_prompt"),
        ("convert", "dequantize"), ("convert", "no_tokenizer"), ("fuse", "dequantize"), ("export", "reduce_rank"),
        ("export", "zero_untrained"), ("export", "compare"), ("export", "prompts"), ("export", "ignore_surplus"),
        ("adapter convert", "reduce_rank"), ("adapter convert", "zero_untrained"), ("check", "reduce_rank"),
        ("check", "zero_untrained"), ("generate", "data_format"), ("generate", "prompt"), ("generate", "kv_bits"),
        ("chat", "system_prompt"), ("chat", "no_system_prompt"), ("serve", "system_prompt"),
        ("serve", "no_system_prompt"), ("data convert", "overwrite"), ("data split", "overwrite"), ("lora", "best"),
        ("lora", "overwrite"), ("recover", "overwrite"), ("export", "best"), ("fuse", "best"),
        ("toolkit train_adapter", "no_cache"), ("chat", "kv_bits"), ("chat", "verbose"), ("serve", "kv_bits"),
        ("serve", "model_id"), ("serve", "strict_turns"), ("serve", "docs"), ("serve", "page"),
        ("serve", "allow_origins"), ("data stats", "truncation"), ("lora", "train"), ("lora", "resume"),
        ("recover", "resume"),
        ("toolkit generate", "prompt"), ("toolkit train_adapter", "activation_checkpointing"),
        ("toolkit train_adapter", "compile_model"), ("toolkit train_adapter", "fixed_sized_sequences"),
        ("toolkit train_adapter", "pack_sequences"), ("toolkit train_adapter", "precision"),
        *((name, option) for name in ("lora", "recover") for option in ("ignore_memory", "project_name")),
        ("lora", "frozen_cache"), ("recover", "frozen_cache"),
        ("cache clear", "older_than"),
        *(("estimate", option) for option in CHECKED_ONLY),
        # `test_draft_command`; the others are those of `lora`.
        *(("draft", p.name) for p in COMMANDS["draft"].params if p.name in {"init", "loss", "test"} | LORAS),
    }  # fmt: skip
    options = [(name, p) for name, command in COMMANDS.items() for p in command.params]
    every = {(name, p.name) for name, p in options if isinstance(p, click.Option)}
    assert sorted(every - tried - elsewhere - {(name, "as_json") for name in COMMANDS}) == []
