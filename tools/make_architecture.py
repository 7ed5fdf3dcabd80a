"""Writes the picture and the table in docs/architecture.md from the imports in the code; a test checks that they are
current.

python tools/make_architecture.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "architecture.md"
START, END = "<!-- written by tools/make_architecture.py -->", "<!-- end -->"


def packages() -> dict[str, list[Path]]:
    """The files of each package, `model_folder.py` and the command line among them; other modules belong to none."""
    found = {
        folder.name: sorted(folder.rglob("*.py")) for folder in sorted((ROOT / "mlx_afm").iterdir()) if folder.is_dir()
    }
    found["model_folder"] = [ROOT / "mlx_afm" / "model_folder.py"]
    return {
        name: files
        for name, files in {**dict(sorted(found.items())), "cli": sorted((ROOT / "cli").rglob("*.py"))}.items()
        if files
    }


def imported(files: list[Path]) -> set[str]:
    """The packages that some files import, late imports included."""
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names |= {parts[1] for module in modules if (parts := module.split("."))[0] == "mlx_afm" and len(parts) > 1}
    return names


def below(name: str, edges: dict[str, set[str]]) -> set[str]:
    """Everything that a package needs."""
    return edges[name].union(*(below(other, edges) for other in edges[name]))


def subject(name: str) -> str:
    """The first sentence of a package's docstring."""
    file = ROOT / ("cli" if name == "cli" else f"mlx_afm/{name}") / "__init__.py"
    file = file if file.is_file() else file.parent.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def document() -> str:
    """The page, with picture and table made anew."""
    files = {name: found for name, found in packages().items() if name != "assets"}
    edges = {name: (imported(found) & files.keys()) - {name} for name, found in files.items()}
    lines = ["```mermaid", "graph TD"]
    for name, others in edges.items():
        # What another one that it imports imports as well needs no arrow.
        direct = others - set().union(*(below(other, edges) for other in others))
        lines += [f"    {name} --> {other}" for other in sorted(direct)]
    lines += ["```", "", "| package | subject | modules |", "|---|---|---|"]
    for name, found in files.items():
        lines.append(f"| `{name}` | {subject(name)} | {len(found)} |")
    head, _, rest = TARGET.read_text(encoding="utf-8").partition(START)
    return "\n".join([head + START, "", *lines, "", END]) + rest.partition(END)[2]


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
