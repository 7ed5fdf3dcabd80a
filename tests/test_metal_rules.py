"""Rules for backends that cannot be tried here, enforced by reading the source.

Metal has no float64, most of `mx.linalg` runs on the CPU alone, arrays must be made on the default
device, and a compiled function cannot look at values.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "mlx_afm").rglob("*.py"))

DEVICE_CHOICES = {
    "mlx.core.set_default_device",
    "mlx.core.set_default_stream",
    "mlx.core.new_stream",
    "mlx.core.stream",
    "mlx.core.Stream",
    "mlx.core.StreamContext",
    "mlx.core.Device",
}
DEVICES = {"mlx.core.cpu", "mlx.core.gpu"}
VALUE_READERS = {"item", "tolist"}


class Source:
    """A parsed module whose names can be asked for what they are."""

    def __init__(self, text):
        self.tree = ast.parse(text)
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        self.aliases = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.split(".")[0]
                    self.aliases[alias.asname or first] = alias.name if alias.asname else first
            elif isinstance(node, ast.ImportFrom):
                self.aliases.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})

    def full_name(self, node):
        """`mx.linalg.svd` as `mlx.core.linalg.svd`; "" for anything but a dotted name."""
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        return ".".join([self.aliases.get(node.id, node.id), *reversed(parts)])

    def named(self, names):
        return [node for node in ast.walk(self.tree) if self.full_name(node) in names]


def float64_faults(source):
    for node in source.named({"mlx.core.float64", "mlx.core.complex128"}):
        yield node.lineno, "Metal has no float64: compute in NumPy, then cast"


def linalg_faults(source):
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and source.full_name(node.func).startswith("mlx.core.linalg."):
            streams = [source.full_name(item.value) for item in node.keywords if item.arg == "stream"]
            if streams != ["mlx.core.cpu"]:
                yield node.lineno, "mx.linalg needs stream=mx.cpu"


def device_faults(source):
    for node in source.named(DEVICE_CHOICES):
        yield node.lineno, "a device or stream chosen by hand"
    for node in source.named(DEVICES):
        parent = source.parents[node]
        if isinstance(parent, ast.Compare):
            continue  # asking which device it is
        call = source.parents.get(parent)
        in_linalg = isinstance(call, ast.Call) and source.full_name(call.func).startswith("mlx.core.linalg.")
        if not (isinstance(parent, ast.keyword) and parent.arg == "stream" and in_linalg):
            yield node.lineno, "a device named outside mx.linalg"


def compiled_functions(source):
    compiled = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and source.full_name(node.func) == "mlx.core.compile":
            compiled |= {item.id for item in node.args if isinstance(item, ast.Name)}
            yield from (item for item in node.args if isinstance(item, ast.Lambda))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef):
            marks = [part for decorator in node.decorator_list for part in ast.walk(decorator)]
            if node.name in compiled or any(source.full_name(part) == "mlx.core.compile" for part in marks):
                yield node


def compile_faults(source):
    for function in compiled_functions(source):
        for node in ast.walk(function):
            if not isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
                continue
            for part in ast.walk(node.test):
                if isinstance(part, ast.Attribute) and part.attr in VALUE_READERS:
                    yield node.lineno, "a branch on a value in a compiled function"


RULES = {"float64": float64_faults, "linalg": linalg_faults, "device": device_faults, "compile": compile_faults}


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps(rule):
    found = [
        f"{file.relative_to(ROOT)}:{line}: {reason}"
        for file in FILES
        for line, reason in RULES[rule](Source(file.read_text(encoding="utf-8")))
    ]
    assert found == []


BROKEN = {
    "float64": ("x.astype(mx.float64)", "mx.zeros(3, dtype=mx.float64)", "from mlx.core import float64\ny = float64"),
    "linalg": ("mx.linalg.svd(x)", "mx.linalg.norm(x, stream=mx.gpu)", "from mlx.core import linalg\nlinalg.qr(x)"),
    "device": (
        "mx.set_default_device(mx.gpu)",
        "mx.add(x, y, stream=mx.cpu)",
        "mx.array(x, mx.cpu)",
        "with mx.stream(s):\n    pass",
        "from mlx.core import new_stream\nnew_stream(d)",
    ),
    "compile": (
        "@mx.compile\ndef f(x):\n    if x.sum().item() > 0:\n        return x",
        "@partial(mx.compile, shapeless=True)\ndef f(x):\n    while x.item():\n        x = x - 1",
        "def f(x):\n    return 1 if x.item() else 2\ng = mx.compile(f)",
        "g = mx.compile(lambda x: 1 if x.item() else 2)",
    ),
}
KEPT = {
    "float64": ("np.float64(1)", "x.astype(mx.float32)"),
    "linalg": ("mx.linalg.svd(x, stream=mx.cpu)", "np.linalg.svd(x)"),
    "device": ("mx.linalg.svd(x, stream=mx.cpu)", "slow = mx.default_device() == mx.cpu"),
    "compile": (
        "def f(x):\n    if x.item():\n        return x",
        "@mx.compile\ndef f(x, n=2):\n    return x if n else -x",
    ),
}
HEADER = "import mlx.core as mx\nimport numpy as np\nfrom functools import partial\n"


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in BROKEN.items() for text in texts])
def test_a_rule_sees_what_breaks_it(rule, text):
    assert list(RULES[rule](Source(HEADER + text)))


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in KEPT.items() for text in texts])
def test_a_rule_lets_pass_what_keeps_it(rule, text):
    assert not list(RULES[rule](Source(HEADER + text)))
