"""Every command line and every Python line of README.md and docs/ runs, on the demo's model under the names used there.

Pages run from top to bottom in a folder of their own. What a line names is there beforehand: models, adapters, data. A
line whose target is there already replaces it, as a reader's folder would not have it yet.
"""

import ast
import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from mlx_afm.serving import ServeConfig, running
from mlx_afm.workflows.convert import convert
from mlx_afm_cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md") if file.name != "cli.md")]
MODELS = ("afm", "afm-mlx", "mlx_model", "M", "DENSE")
CODES = ("Q", "afm-2bit", "afm-2bit-mine")
ADAPTERS = ("myadapter", "my-adapter", "adapter", "adapters/poet", "adapters/shell", "run")
PACKAGES = ("poet.fmadapter", "legal.fmadapter")
DATA = ("mydata", "my_data", "D", "data", "my-task", "SRC")
TOOLKITS = ("adapter_training_toolkit", "TOOLKIT", "toolkit")
TARGETS = {"convert": "--mlx-path", "fuse": "--save-path", "lora": "--adapter-path", "recover": "--adapter-path",
           "data split": "--out"}  # fmt: skip
# Options that make a line short and change nothing of what it shows.
SHORT = {"lora": ["--iters", "1", "--batch-size", "2", "--no-cache"], "recover": ["--iters", "1", "--batch-size", "2"],
         "draft": ["--iters", "2", "--batch-size", "2"], "generate": ["-m", "2"], "chat": ["-m", "2"]}  # fmt: skip
# What `...` stands for.
REST = {"lora": "--model afm --train --data mydata --adapter-path again", "export": "--adapter-path myadapter --name x"}
NOT_HERE = {
    "docs/draft-pair.md": "the toolkit's draft assets; tests/workflows/test_open_draft_pair.py makes small ones",
}
CITY = {"title": "City", "type": "object", "properties": {"name": {"type": "string"}}}
EXIT_CODES = (0, 3)


def blocks_of(page):
    """(language, text) of the code in a page: fenced with its language, indented without."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = [(match.start(), match[1] or "text", match[2]) for match in fenced.finditer(text)]
    plain = fenced.sub(lambda match: "\n" * len(match[0]), text)  # keeps the places in order
    for match in re.finditer(r"(?:^(?:    .*)?\n)+", plain, re.MULTILINE):
        code = "\n".join(line[4:] for line in match[0].splitlines()).strip("\n")
        if code:
            found.append((match.start(), "", code + "\n"))
    return [(language, code) for _, language, code in sorted(found)]


def commands_of(code):
    """The lines of mlx-afm in a block, put together where they end with a backslash, without their comments."""
    joined = re.sub(r"\\\n\s*", " ", code)
    lines = [re.sub(r"\s{2,}#.*$", "", line) for line in joined.splitlines()]
    return [line for line in lines if line.startswith("mlx-afm ")]


def is_python(language, code):
    """Whether a block is Python: fenced so, or an indented one that can be parsed and is more than names."""
    if language:
        return language == "python"
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return False
    return not all(isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call) for node in tree.body)


@pytest.fixture(scope="module")
def originals(toolkit_folder, model_folder, adapter_forms, data_folder, tmp_path_factory):
    """What the names of the pages stand for."""
    from mlx_afm.quant import QuantConfig

    folder = tmp_path_factory.mktemp("originals")
    codes = convert(model_folder, folder / "codes", quantization=QuantConfig(recipe="apple")).folder
    shutil.copytree(toolkit_folder, folder / "toolkit" / "assets")
    for suffix in (".pt", "-config.json"):
        shutil.copy(toolkit_folder / f"base-model{suffix}", folder / "toolkit" / "assets" / f"draft-model{suffix}")
    names = {
        **dict.fromkeys((*MODELS, "draft-mlx", "source"), model_folder),
        **dict.fromkeys(CODES, codes),
        **dict.fromkeys(ADAPTERS, adapter_forms["folder"]),
        **dict.fromkeys(PACKAGES, adapter_forms["fmadapter"]),
        **dict.fromkeys(DATA, data_folder),
        **dict.fromkeys(TOOLKITS, folder / "toolkit"),
    }
    return {name: Path(path) for name, path in names.items()}


@pytest.fixture
def place(originals, tmp_path, monkeypatch, data_folder):
    """A folder where everything that the pages name is; the current one, and home."""
    put_in_place(originals, tmp_path)
    (tmp_path / "questions.jsonl").write_text('{"prompt": "list the files"}\n')
    (tmp_path / "pairs.tsv").write_text("one\ttwo\nthree\tfour\n")
    (tmp_path / "faq.csv").write_text("question,answer\none,two\n")
    shutil.copy(data_folder / "train.jsonl", tmp_path / "all.jsonl")
    (tmp_path / "city.json").write_text(
        '{"title": "City", "type": "object", "properties": {"name": {"type": "string"}}}'
    )
    (tmp_path / "my_transform.py").write_text("def shorten(messages, index):\n    return messages\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, value in {"HOME": "", "MLX_AFM_CACHE": "cache", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value if value == "1" else str(tmp_path / value))
    return tmp_path


def put_in_place(originals, place):
    """Links to what the names stand for, instead of what the lines above made of them."""
    for name, source in originals.items():
        target = place / name
        target.parent.mkdir(exist_ok=True)
        if not target.is_symlink():
            shutil.rmtree(target, ignore_errors=True)
            target.symlink_to(source)


def run_command(line, monkeypatch, capsys, place):
    """Runs a line of a page, made short."""
    for name, rest in REST.items():
        line = line.replace(f"mlx-afm {name} ...", f"mlx-afm {name} {rest}")
    words = shlex.split(re.sub(r"[\[\]]|(?<=\s)\.\.\.$", "", line))[1:]
    if words[0] == "data" and words[1] == "render" and "--line" in words:
        words[words.index("--line") + 1] = "2"  # the data here is shorter
    if words[0] == "lora" and "--epochs" in words:
        del words[words.index("--epochs") : words.index("--epochs") + 2]
    if words[0] == "lora" and "--train" not in words and "--resume" not in words:
        short = []
    else:
        short = SHORT.get(words[0], [])
    if words[0] == "draft" and "--test" in words:
        short = []
    if "qat" in words:
        short = [*short, "--targets", "q,k,v,o,gate,up"]  # the demo's down projection has no multiple of 32 columns
    _clear_target(words, place)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n"), encoding="utf-8"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*words, *short])
    code, said = stop.value.code or 0, capsys.readouterr()
    if words[0] == "serve":
        assert "nothing listens in this test" in said.err, (line, said.err)
    else:
        assert code in EXIT_CODES, (line, said.err)


def _clear_target(words, place):
    if words[:2] == ["data", "convert"]:
        (place / words[3]).unlink(missing_ok=True)
    option = TARGETS.get(words[0], TARGETS.get(" ".join(words[:2])))
    resumes = "--resume" in words or (words[0] == "lora" and "--train" not in words)
    if option in words and not resumes:
        target = place / Path(words[words.index(option) + 1]).expanduser()
        if target.is_symlink():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)


PYTHON = {  # what stands for what a page leaves open
    "model=..., data=..., adapter_path=...": 'model="afm", data="mydata", adapter_path="py"',
    "messages, max_tokens=64): ...": "messages, max_tokens=2): ...",
    "max_tokens=64": "max_tokens=2",
    'mlx_afm.convert("adapter_training_toolkit", "afm"': 'mlx_afm.convert("adapter_training_toolkit", "afm-new"',
    ", resume=True": "",
    '"...", speculation': '"hello", max_tokens=2, speculation',
}


def run_python(code, names, monkeypatch):
    for text, other in PYTHON.items():
        code = code.replace(text, other)
    exec(compile(code, "page", "exec"), names)


def names_of_a_reader():
    """Names that pages use without making them."""
    import mlx_lm

    import mlx_afm

    model, tokenizer = mlx_afm.load("afm")
    tool = {"type": "function", "function": {"name": "weather", "parameters": {**CITY, "title": "Weather"}}}
    return {"mlx_afm": mlx_afm, "mlx_lm": mlx_lm, "model": model, "tokenizer": tokenizer, "City": CITY,
            "messages": [{"role": "user", "content": "hello"}], "prompts": ["hello", "list"], "tools": [tool],
            "answer": "hello", "path": Path("adapters/poet"), "source": "afm", "target": "new-codes"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sockets that other tests' clients left
@pytest.mark.parametrize("page", PAGES)
def test_commands(page, originals, place, monkeypatch, capsys):
    def refuse(*arguments, **settings):
        raise OSError(98, "nothing listens in this test")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    if page in NOT_HERE:
        pytest.skip(NOT_HERE[page])
    for _, code in blocks_of(page):
        put_in_place(originals, place)
        for line in commands_of(code):
            run_command(line, monkeypatch, capsys, place)


@pytest.mark.parametrize("page", [page for page in PAGES if any(is_python(*block) for block in blocks_of(page))])
def test_python(page, place, monkeypatch):
    pytest.importorskip("llguidance", reason="the guided extra is not installed")
    names = names_of_a_reader()
    for language, code in blocks_of(page):
        if is_python(language, code) and not code.startswith("client = "):
            run_python(code, names, monkeypatch)


def test_the_client_of_the_page_on_serving(place):
    openai = pytest.importorskip("openai", reason="the dev extra is not installed")
    (code,) = [code for _, code in blocks_of("docs/serving.md") if code.startswith("client = ")]
    with running("afm-mlx", {"poet": "poet.fmadapter"}, ServeConfig(port=0, max_tokens=2)) as server:
        names = {"openai": openai}
        exec(code.replace("http://127.0.0.1:8080", server.url), names)
        names["client"].close()


def test_no_line_is_forgotten():
    """Each line of mlx-afm is run; those of other programs are in test_mlx_lm_programs.py."""
    runnable = [line for page in PAGES for _, code in blocks_of(page) for line in commands_of(code)]
    assert len(runnable) > 50
    shown = {
        line for page in PAGES for line in (ROOT / page).read_text().splitlines() if line.startswith("    mlx-afm ")
    }
    begun = {re.sub(r"\s{2,}#.*$| \\$", "", line.strip()) for line in shown}
    assert [line for line in begun if not any(run.startswith(line) for run in runnable)] == []
