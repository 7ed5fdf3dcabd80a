"""Random command lines over small good and broken inputs: never a traceback, exit codes 0 to 3, nothing left behind.

Each case draws a command, most of its required arguments and a few of its options; values come from pools that fit the
option's type or do not. A failing case prints its command line; `SEEDS` makes it the same every time.
"""

import io
import json
import random
import shlex
import shutil
import sys

import click
import pytest

from command_lines import leaves, shortest_lines
from mlx_afm_cli.main import group, main

BLOCK = 100
ORDINARY = (0,)
ALL = tuple(range(1, 21))
INTEGERS = ("-1", "0", "1", "2", "3", "7", "-99999999999999999999", "99999999999999999999", "x", "", "1.5", "0x10")
FLOATS = ("-1", "0", "0.5", "1", "1e-3", "nan", "inf", "-inf", "1e400", "x", "")
TEXTS = ("", " ", "a", "box", "a b", "naïve", "\ud83d", "a=b", "prompt=question", "=", "-", "x" * 5000, "<turn_end>",
         "os:getcwd", "gone:f", "q,k,v", "0-2", "reuse", "last-1", "wandb", "iOS", "ON_DEMAND", "4-bit", "1GB", "0",
         "16 GiB", "~", "apple", "\x1b[31m", "{", "null")  # fmt: skip


COMMANDS = leaves(group)


@pytest.fixture(scope="module")
def world(toolkit_folder, model_folder, adapter_forms, other_adapter, data_folder, tmp_path_factory):
    """Inputs by name, all below one folder that no command may change."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(toolkit_folder, folder / "toolkit" / "assets")
    shutil.copytree(model_folder, folder / "model")
    shutil.copytree(adapter_forms["folder"], folder / "adapter")
    shutil.copy(adapter_forms["pt"], folder / "adapter.pt")
    shutil.copytree(adapter_forms["fmadapter"], folder / "box.fmadapter")
    shutil.copytree(other_adapter, folder / "other")
    shutil.copytree(data_folder, folder / "data")
    _quantize(folder)
    _break_things(folder)
    (folder / "chat.jsonl").write_text('{"prompt": "list the files"}\n{"prompt": "sort x"}\n')
    (folder / "flat.csv").write_text("prompt,completion\na,b\nc,d\n")
    (folder / "schema.json").write_text('{"type": "object", "properties": {"a": {"type": "integer"}}}')
    (folder / "run.yaml").write_text(f"model: {folder}/model\ndata: {folder}/data\niters: 1\nbatch_size: 2\n")
    (folder / "mlx_lm.yaml").write_text("mask_prompt: true\nlora_parameters: {keys: [q_proj], rank: 8}\n")
    (folder / "wrong.yaml").write_text("rate_factors: {lora_b: x}\noptimizer_config: {adamw: 3}\nmodel: [1]\n1: 2\n")
    (folder / "manifest.json").write_text('{"assetPackID": "x", "downloadPolicy": {"onDemand": null}}')
    return folder


def _quantize(folder):
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--hf-path", str(folder / "model"), "--mlx-path", str(folder / "codes"), "-q"])
    assert not stop.value.code


def _break_things(folder):
    """Copies of the good inputs, each damaged in one way, and things that are none of them."""
    for name, file in (("model", "config.json"), ("adapter", "adapter_config.json"), ("data", "train.jsonl")):
        for damage, content in (("empty", b""), ("garbage", b"\x00\xff{" * 99), ("list", b"[1]"), ("object", b"{}")):
            target = folder / f"{name}-{damage}"
            shutil.copytree(folder / name, target)
            (target / file).write_bytes(content)
    for name, file in (("model", "model.safetensors"), ("adapter", "adapters.safetensors")):
        target = folder / f"{name}-cut"
        shutil.copytree(folder / name, target)
        for found in [*target.glob(file), *target.glob("*-of-*.safetensors")]:
            found.write_bytes(found.read_bytes()[:3000])
    shutil.copytree(folder / "box.fmadapter", folder / "cut.fmadapter")
    for found in (folder / "cut.fmadapter").iterdir():
        found.write_bytes(found.read_bytes()[: found.stat().st_size // 2])
    shutil.copytree(folder / "model", folder / "no-tokenizer", ignore=shutil.ignore_patterns("tokenizer.model"))
    (folder / "cut.pt").write_bytes((folder / "adapter.pt").read_bytes()[:5000])
    (folder / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (folder / "empty").mkdir()
    for name in ("none.jsonl", "none.json", "none.yaml", "none.pt", "none.csv", "none.safetensors"):
        (folder / name).write_bytes(b"")
    (folder / "bad.jsonl").write_bytes(b'{"prompt": 3}\n[1, 2]\n\xff\n{"messages": [{"role": "x"}]}\n' + b"[" * 9999)
    (folder / "deep.json").write_text("[" * 5000)
    (folder / "deep.yaml").write_text("[" * 3000)
    (folder / "loop").symlink_to(folder / "loop")


def _value(rng, parameter, world, out):
    """A text for a parameter: mostly of its type, sometimes anything."""
    kind, name = type(parameter.type).__name__, parameter.name or ""
    if rng.random() < 0.06:
        return rng.choice(TEXTS)
    if isinstance(parameter.type, click.Choice):
        return rng.choice([*parameter.type.choices, "nonsense"])
    if "Int" in kind:
        return rng.choice([text for text in INTEGERS if name not in ENDLESS or len(text) < 9 or text[0] == "-"])
    if "Float" in kind:
        return rng.choice(FLOATS)
    if name in ("model", "source", "teacher", "draft_model") and rng.random() < 0.7:
        return str(world / rng.choice(["model", "model", "model", "codes", "toolkit", "no-tokenizer"]))
    if name in ("data", "positional", "train_data", "eval_data", "calibration_data") and rng.random() < 0.7:
        return str(world / rng.choice(["data", "data", "data/train.jsonl", "flat.csv", "chat.jsonl"]))
    if name in ("adapter_path", "adapter", "resume_adapter_file", "checkpoint", "expect") and rng.random() < 0.7:
        return str(world / rng.choice(["adapter", "adapter.pt", "box.fmadapter", "other"]))
    if kind == "PathType" or isinstance(parameter, click.Argument):
        return _path(rng, world, out)
    if name == "named":
        return f"{rng.choice(['a', '', 'a b', 'x'])}={_path(rng, world, out)}"
    if name in ("prompt", "creator_defined") and rng.random() < 0.5:
        return rng.choice(["hello", _path(rng, world, out), str(world / "chat.jsonl")])
    return rng.choice(TEXTS)


def _path(rng, world, out):
    inputs = sorted(path.name for path in world.iterdir())
    return rng.choice(
        [
            str(world / rng.choice(inputs)),
            str(world / rng.choice(inputs)),
            str(
                out
                / rng.choice(["new", "new.pt", "new.fmadapter", "new.svg", "new.jsonl", "new/deep", "n.safetensors"])
            ),
            "~/home-file",
            "/dev/null",
            str(out / ("x" * 300)),
            "~nobody-of-this-name/x",
            rng.choice(["", ".", "nowhere"]),
        ]
    )


ENDLESS = {"iters", "epochs", "init_rounds"}  # a large number of these is right, and takes for ever
OUTPUTS = {"target", "output", "save_path", "output_dir", "out", "fix", "output_path", "checkpoint_dir", "manifest",
           "prompt_cache_file"}  # fmt: skip


def _command_line(rng, world, out):
    """A line that works with a few options more, or one drawn as a whole."""
    name = rng.choice(list(COMMANDS))
    command, words = COMMANDS[name], name.split()
    if rng.random() < 0.5:
        line = [*words, *_lines(world, out)[name], *CHEAP.get(name, ())]
        for parameter in rng.sample(command.params, min(len(command.params), rng.choice((1, 1, 2, 3)))):
            if isinstance(parameter, click.Option):
                line += _words(parameter, _drawn(rng, name, parameter, world, out), rng)
        return [*line, *AT_THE_END.get(name, ())]
    line = [*words, *CHEAP.get(name, ())]
    if name in ("lora", "recover") and rng.random() < 0.8:
        line += ["--model", str(world / "model"), "--data", str(world / "data"), *["--train"][name == "recover" :]]
    for parameter in command.params:
        if rng.random() < (0.93 if parameter.required else min(0.5, 2.5 / len(command.params))):
            line += _words(parameter, _drawn(rng, name, parameter, world, out), rng)
    return [*line, *AT_THE_END.get(name, ())]


def _with_own_model(line, world, out):
    """A line that changes its model gets a copy of it."""
    if "--into-base" not in line:
        return line
    (out / "copies").mkdir()
    copies = {str(folder): out / "copies" / folder.name for folder in world.iterdir() if folder.is_dir()}
    for source in {word for word in line if word in copies}:
        shutil.copytree(source, copies[source])
    return [str(copies.get(word, word)) for word in line]


CHEAP = {"lora": ["--iters", "1", "--batch-size", "2"], "recover": ["--iters", "1", "--batch-size", "2"],
         "generate": ["-m", "2"], "chat": ["-m", "2"], "toolkit generate": ["--max-new-tokens", "2"],
         "toolkit train_adapter": ["--epochs", "1"], "serve": ["--port", "0"]}  # fmt: skip


AT_THE_END = {"demo": ["--out", "/dev/null"]}  # it takes minutes


def _drawn(rng, name, parameter, world, out):
    if parameter.name in OUTPUTS or (parameter.name == "adapter_path" and name in ("lora", "recover")):
        return _output(rng, world, out)
    return _value(rng, parameter, world, out)


def _output(rng, world, out):
    """Where something is to be written: mostly a new place, sometimes one that is taken or cannot be."""
    names = ["new", "new", "new.pt", "new.fmadapter", "new.svg", "new.jsonl", "new/deep", "n.safetensors", "taken"]
    (out / "taken").mkdir(exist_ok=True)
    (out / "taken" / "mine").write_text("mine")
    odd = ["/dev/null", "", ".", str(out / ("x" * 300)), str(out / "taken" / "mine"), str(out / "taken/mine/x"), "~/f"]
    return rng.choice([*(str(out / name) for name in names), *odd])


def _lines(world, out):
    """The shortest lines that work, which write below `out`."""
    (out / "base").mkdir(exist_ok=True)
    if not (out / "base" / "log").exists():
        inputs = {name: world / name for name in ("model", "codes", "data")}
        forms = {"folder": "adapter", "pt": "adapter.pt", "fmadapter": "box.fmadapter"}
        inputs |= {"toolkit": world / "toolkit" / "assets"} | {f"adapter {k}": world / v for k, v in forms.items()}
        return shortest_lines(out / "base", inputs)
    raise AssertionError("once for each case")


def _words(parameter, value, rng):
    if isinstance(parameter, click.Argument):
        return [value]
    option = rng.choice(parameter.opts)
    if getattr(parameter, "is_flag", False) or getattr(parameter, "count", False):
        return [option]
    return [f"{option}={value}"] if option.startswith("--") and rng.random() < 0.5 else [option, value]


def _contents(folder):
    """Every file below a folder, with its size and time of change."""
    return {
        path: (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


@pytest.mark.parametrize("seed", [*ORDINARY, *(pytest.param(seed, marks=pytest.mark.slow) for seed in ALL)])
def test_random_command_lines(seed, world, tmp_path, monkeypatch, capsys):
    _isolate(monkeypatch, tmp_path)
    before, failures = _contents(world), []
    for number in range(BLOCK):
        rng = random.Random(f"{seed} {number}")
        out = tmp_path / f"case-{number}"
        (out / "cwd").mkdir(parents=True)
        monkeypatch.chdir(out / "cwd")
        line = _with_own_model(_command_line(rng, world, out), world, out)
        failures += [f"{fault}: mlx-afm {shlex.join(line)}" for fault in _run(line, monkeypatch, capsys)]
        failures += [f"hidden {path}: {shlex.join(line)}" for path in out.rglob(".*")]
        if changed := dict(_contents(world).items() ^ before.items()):
            failures.append(f"changed {sorted(map(str, changed))[:3]}: {shlex.join(line)}")
            before = _contents(world)
        shutil.rmtree(out)
    left = {path.name for path in tmp_path.iterdir()} - {"home", "cache"}
    assert not failures, "\n".join(failures)
    assert not left


def _isolate(monkeypatch, tmp_path):
    """A home, a cache and a terminal of the test's own; nothing listens and nothing is downloaded."""
    for name in ("home", "cache"):
        (tmp_path / name).mkdir()
    for name, value in {"HOME": "home", "MLX_AFM_CACHE": "cache", "XDG_CACHE_HOME": "cache"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def refuse(*arguments, **settings):
        raise OSError(98, "nothing listens in this test")

    monkeypatch.setattr("socket.getaddrinfo", refuse)


def _run(line, monkeypatch, capsys):
    """What one command line did that none may do."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n/reset\n/quit\n"), encoding="utf-8"))
    capsys.readouterr()
    try:
        main(line)
        return ["main returned"]
    except SystemExit as stop:
        code = 0 if stop.code is None else stop.code
    except BaseException as error:
        return [f"{type(error).__name__} {error!s:.200}"]
    out, err = capsys.readouterr()
    faults = [f"exit {code}"] if code not in (0, 1, 2, 3) else []
    faults += ["traceback"] if "Traceback" in err + out else []
    faults += ["silent failure"] if code in (1, 2) and not err.strip() else []
    faults += ["stdout is no JSON"] if code == 0 and "--json" in line and not _is_json(out) else []
    return faults


def _is_json(text):
    def refuse(name):
        raise ValueError(name)

    try:
        return bool([json.loads(line, parse_constant=refuse) for line in text.splitlines()])
    except ValueError:
        return False
