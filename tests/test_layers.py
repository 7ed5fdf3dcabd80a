"""Imports point down only, and heavy or foreign libraries stay where they belong. Read from the source."""

import ast
import re
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first; a unit may import those below it.
LEVELS = (
    ("_version", "errors", "files", "folders", "spelling", "tree", "assets"),
    ("formats", "quant"),
    ("model", "text"),
    ("adapters", "checkpoints", "data", "interop"),
    ("model_folder",),
    ("training", "generation", "memory"),
    ("draft",),
    ("runs",),
    ("workflows",),
    ("serving", "evaluation"),
    ("__init__", "__main__"),
    ("cli",),
)
LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}

# (importer, imported) of one level, and why.
ALLOWED = {
    ("files", "errors"): "the errors it raises",
    ("folders", "errors"): "the errors it raises",
    ("folders", "files"): "a temporary file or folder is removed as it is made",
    ("tree", "errors"): "the errors it raises",
    ("memory", "training"): "how large the chunks of the loss are",
    ("adapters", "checkpoints"): "the one table of names holds the adapter's too",
}
UPWARD = {("__main__", "cli"): "`python -m mlx_afm` is the command"}

FORMATS_MAY_IMPORT = {"numpy", "mlx_afm.errors", "mlx_afm.files", "mlx_afm.formats"}
WEB = {"fastapi", "fastapi_offline", "h11", "prometheus_client", "pydantic", "starlette", "uvicorn"}
DEPENDENCIES = WEB | {"filelock", "mlx", "mlx_lm", "numpy", "sentencepiece", "click", "rich", "yaml", "huggingface_hub"}
OPTIONAL = {
    "datasets",
    "llguidance",
    "matplotlib",
    "swanlab",
    "tensorboardX",
    "wandb",
}  # imported late, where one is asked for
# Modules that are of no use without an optional library.
ONLY_WITH = {"mlx_afm/evaluation/lm_eval_model.py": {"lm_eval"}}
# Not settings but a file of the toolkit's that happens to be YAML; formats/ gets the plain value.
YAML_FORMATS = {"mlx_afm/workflows/draft_pair.py": "checkpoint_spec.yaml"}
ORACLES = {"torch", "tamm", "coremltools", "safetensors"}


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        file, line: where.
        name: full module path, with the imported name if that is a module of ours.
        inner: inside a function, so that it runs late.
        typing: under `if TYPE_CHECKING`, so that it never runs.
    """

    file: Path
    line: int
    name: str
    inner: bool
    typing: bool

    @property
    def place(self):
        return f"{self.file.relative_to(ROOT)}:{self.line}"

    @property
    def top(self):
        return self.name.split(".")[0]

    @property
    def unit(self):
        """Our unit that is imported, or None."""
        parts = self.name.split(".")
        if parts[0] == "mlx_afm_cli":
            return "cli"
        return (parts[1] if len(parts) > 1 else "__init__") if parts[0] == "mlx_afm" else None


def source_files():
    return sorted([*(ROOT / "mlx_afm").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])


def unit_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return "cli" if parts[0] == "cli" else parts[1]


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def full_module(node, file):
    """The module that `from MODULE import` names; relative ones are resolved."""
    if not node.level:
        return node.module
    package = ["mlx_afm_cli" if part == "cli" else part for part in file.parent.relative_to(ROOT).parts]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *([node.module] if node.module else [])])


def imports_of(file):
    found = []

    def walk(node, inner, typing):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                name = alias.name
                if isinstance(node, ast.ImportFrom):
                    module = full_module(node, file)
                    name = f"{module}.{name}" if is_module(f"{module}.{name}") else module
                found.append(Import(file, node.lineno, name, inner, typing))
        inner = inner or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                walk(child, inner, True)
            for child in node.orelse:
                walk(child, inner, typing)
            return
        for child in ast.iter_child_nodes(node):
            walk(child, inner, typing)

    walk(ast.parse(file.read_text(encoding="utf-8")), False, False)
    return found


@pytest.fixture(scope="module")
def imports():
    return [item for file in source_files() for item in imports_of(file)]


def test_every_module_has_a_level():
    homeless = {str(file.relative_to(ROOT)) for file in source_files() if unit_of(file) not in LEVEL_OF}
    assert not homeless, "add them to LEVELS, where they belong"


def test_imports_point_down(imports):
    wrong = []
    for item in imports:
        importer, imported = unit_of(item.file), item.unit
        if imported in (None, importer) or (importer == "__init__" and item.typing):
            continue
        down = LEVEL_OF[imported] < LEVEL_OF[importer]
        if not (down or (importer, imported) in ALLOWED or (importer, imported) in UPWARD):
            wrong.append(f"{item.place}: {importer} imports {imported}")
    assert not wrong


def test_no_exception_outlives_its_need(imports):
    used = {(unit_of(item.file), item.unit) for item in imports}
    assert set(ALLOWED) | set(UPWARD) <= used


def test_the_package_itself_imports_only_its_version(imports):
    runs = {item.name for item in imports if unit_of(item.file) == "__init__" and not item.typing}
    assert {name for name in runs if name.startswith("mlx_afm")} == {"mlx_afm._version"}


def test_formats_know_bytes_and_arrays_only(imports):
    wrong = []
    for item in imports:
        if unit_of(item.file) != "formats" or item.top in sys.stdlib_module_names:
            continue
        ours = f"mlx_afm.{item.unit}" if item.unit else item.top
        if ours not in FORMATS_MAY_IMPORT:
            wrong.append(f"{item.place}: {item.name}")
    assert not wrong


def test_mlx_lm_is_imported_late_and_in_two_places_only(imports):
    wrong = [
        item.place
        for item in imports
        if item.top == "mlx_lm"
        and (unit_of(item.file) not in ("generation", "interop") or not (item.inner or item.typing))
    ]
    assert not wrong


def test_oracles_are_never_imported(imports):
    assert [f"{item.place}: {item.name}" for item in imports if item.top in ORACLES] == []


def test_only_declared_libraries_are_imported(imports):
    ours = {"mlx_afm", "mlx_afm_cli"}
    unknown = [
        f"{item.place}: {item.name}"
        for item in imports
        if item.top not in sys.stdlib_module_names
        and item.top not in ours | DEPENDENCIES
        and not (item.top in OPTIONAL and item.inner)
        and item.top not in ONLY_WITH.get(str(item.file.relative_to(ROOT)), ())
    ]
    assert unknown == []


def test_the_web_stays_in_the_server(imports):
    assert [item.place for item in imports if item.top in WEB and unit_of(item.file) != "serving"] == []


def test_the_terminal_belongs_to_the_command_line(imports):
    terminal = {"click", "rich", "yaml", "argparse"}
    found = [item for item in imports if item.top in terminal and unit_of(item.file) != "cli"]
    assert [item.place for item in found if str(item.file.relative_to(ROOT)) not in YAML_FORMATS] == []
    assert {item.top for item in found} == {"yaml"}
    assert all(item.inner for item in found)


def test_names_are_imported_dynamically_in_three_places_only(imports):
    dynamic = {str(item.file.relative_to(ROOT)) for item in imports if item.top == "importlib"}
    assert dynamic == {"mlx_afm/__init__.py", "mlx_afm/data/records.py", "cli/main.py"}


def test_the_library_does_not_print():
    printing = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in source_files()
        if unit_of(file) != "cli"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_no_path_leads_out_of_the_package():
    """Neither to test or parity scripts nor into anyone's home: what is installed must stand alone."""
    outward = re.compile(r"(^|[\"'\s])(/(home|Users|root|opt|mnt|tmp)/|\.\./|tools/|benchmarks/|tests/parity)|parity/")
    found = []
    for file in source_files():
        with file.open("rb") as handle:
            for token in tokenize.tokenize(handle.readline):
                if token.type in (tokenize.STRING, tokenize.COMMENT) and outward.search(token.string):
                    found.append(f"{file.relative_to(ROOT)}:{token.start[0]}")
    assert found == []


def test_every_package_is_installed():
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "mlx_afm").rglob("__init__.py")}
    assert {name for name in packages if f'"{name}"' not in listed} == set()


def test_no_two_public_classes_share_a_name():
    places: dict[str, list[str]] = {}
    for file in source_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def module_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = ("mlx_afm_cli", *parts[1:]) if parts[0] == "cli" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(edges):
    """The groups of modules that import each other, directly or by way of others."""
    reached = {name: set(others) for name, others in edges.items()}
    for middle in reached:
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    return {
        frozenset({name} | {other for other in others if name in reached.get(other, ())})
        for name, others in reached.items()
        if name in others
    }


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {frozenset({"b", "c"})}


def test_no_modules_import_each_other(imports):
    """Late imports and those for types count: what needs each other belongs in one module, or a part of it below."""
    modules = {module_of(file) for file in source_files()}
    edges = {name: set() for name in modules}
    for item in imports:
        if item.name in modules and item.name != module_of(item.file):
            edges[module_of(item.file)].add(item.name)
    assert circles(edges) == set()
