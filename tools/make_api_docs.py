"""Writes docs/api.md from the docstrings of the public names; a test checks that it is current.

python tools/make_api_docs.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_afm
from mlx_afm.errors import AFMError

TARGET = Path(__file__).resolve().parents[1] / "docs" / "api.md"
HEADER = """# Python

Written by `tools/make_api_docs.py` from the docstrings; do not edit. All names are imported from `mlx_afm`. Settings
and results are dataclasses; errors derive from `AFMError`.

    model, tokenizer = mlx_afm.load("afm-mlx", "my-adapter")
    for response in mlx_afm.stream_generate(model, tokenizer, "Name three fruits.", max_tokens=64):
        print(response.text, end="")
"""
# Headings, and the names below them in this order; what is nowhere here is an error of this script.
GROUPS = {
    "Models and answers": """load Model AFMTokenizer ModelFolder generate stream_generate batch_generate GenerateConfig
        GenerationResponse Answer PrefixCache Speculation response_format register""",
    "Training": """train LoRAJob LoRAConfig TrainConfig DataConfig Trained Callback Objective recover RecoverJob
        Recovered score Score plot list_cache clear_cache CacheEntry""",
    "Folders, quantization, fusing": "convert Converted QuantConfig Calibration InitConfig fuse Fused inspect",
    "Packages": """export_package export_fmadapter ExportConfig Exported FormChange Rounding LogitChange Metadata
        check_package check_fmadapter CheckConfig PackageReport LazyTensor convert_adapter""",
}


def signature(name: str, member: Any) -> str:
    """How a name is called, one argument a line if it is long."""
    if inspect.isclass(member) and not (dataclasses.is_dataclass(member) or "__init__" in vars(member)):
        return name
    called = inspect.signature(member)
    parts = [str(part) for part in called.parameters.values()]
    kinds = [part.kind for part in called.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parts.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returned = "" if inspect.isclass(member) else f" -> {called.return_annotation}"
    line = f"{name}({', '.join(parts)}){returned}"
    line = line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returned}"
    line = re.sub(r"<factory>|<function .*? at 0x[0-9a-f]+>", "...", line)
    return re.sub(r"\bmlx_afm(\.\w+)*\.(?=[A-Z])|'(?=[A-Z])", "", line.replace("'", ""))


def public_methods(member: type) -> Iterator[tuple[str, Any]]:
    """Methods of a class's own that have a docstring, of ModelFolder and the like."""
    for name, method in vars(member).items():
        function = method.__func__ if isinstance(method, (classmethod, staticmethod)) else method
        if not name.startswith("_") and inspect.isfunction(function) and inspect.getdoc(function):
            yield name, function


def entry(name: str) -> str:
    member = getattr(mlx_afm, name)
    text = f"\n### {name}\n\n```text\n{signature(name, member)}\n```\n\n```text\n{inspect.getdoc(member)}\n```\n"
    if inspect.isclass(member) and not dataclasses.is_dataclass(member):
        for method, function in public_methods(member):
            text += f"\n**{name}.{method}**: {(inspect.getdoc(function) or '').partition(chr(10))[0]}\n"
    return text


def document() -> str:
    groups = {heading: names.split() for heading, names in GROUPS.items()}
    errors = [n for n in mlx_afm.__all__ if isinstance(e := getattr(mlx_afm, n), type) and issubclass(e, AFMError)]
    groups["Errors"] = sorted(errors, key=lambda name: (name != "AFMError", name))
    listed = [name for names in groups.values() for name in names]
    if wrong := {*listed} ^ {*mlx_afm.__all__, "__version__"} - {"__version__"}:
        raise SystemExit(f"in one of the lists only: {sorted(wrong)}")
    return HEADER + "".join(
        f"\n## {heading}\n" + "".join(entry(name) for name in names) for heading, names in groups.items()
    )


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
