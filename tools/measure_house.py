"""Counts the size of a checkout, and the files and types on the three main ways through it.

    python tools/measure_house.py CHECKOUT MODEL DATA

MODEL is an MLX model folder and DATA a folder of training data, such as `model` and `data` of `mlx-afm demo`. The ways
are run and every function of the library that is called is noted: the files are those of these functions, the types
are the public classes of the library of which a method ran. What runs while modules are imported is not counted.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LONG_FUNCTION, SHORT_MODULE = 40, 40
TRACE = """
import json, sys, threading
files, types = set(), set()
root = sys.argv[1]

def note(frame, event, argument):
    code = frame.f_code
    inside = code.co_filename.startswith((root + "/mlx_afm/", root + "/cli/"))
    if event == "call" and inside and code.co_name != "<module>":
        files.add(code.co_filename[len(root) + 1:])
        owner = frame.f_locals.get("self")
        if type(owner).__module__.startswith("mlx_afm") and not type(owner).__name__.startswith("_"):
            types.add(type(owner).__name__)

def start():
    threading.setprofile(note)
    sys.setprofile(note)

def stop():
    sys.setprofile(None)
    threading.setprofile(None)
    print(json.dumps({"files": sorted(files), "types": sorted(types)}))
"""
WAYS = {
    "JSONL to loss": """
import mlx_afm
from pathlib import Path
from mlx_afm.data import DataConfig, make_batch, read_tokens
from mlx_afm.training import DataOrder, TrainConfig
from mlx_afm.training.step import batch_loss
model, _ = mlx_afm.load(sys.argv[2])
file = Path(sys.argv[2]) / "tokenizer.model"
start()
table = read_tokens((Path(sys.argv[3]) / "train.jsonl",), file, DataConfig(max_tokens=1024), workers=1)
order = DataOrder(table, TrainConfig(batch_tokens=1024)).epoch(0)
loss = batch_loss(model, make_batch([table[index] for index in order[0]]))
stop()
""",
    "prompt to logits": """
import mlx_afm
from mlx_afm.generation import to_prompt_ids
import mlx.core as mx
model, tokenizer = mlx_afm.load(sys.argv[2])
start()
ids = to_prompt_ids(tokenizer, "copy abc")
mx.eval(model(mx.array([ids])))
stop()
""",
    "chat request": """
import httpx
from mlx_afm.serving import ServeConfig, running
body = {"model": "m", "messages": [{"role": "user", "content": "copy abc"}], "max_tokens": 4}
threading.setprofile(note)  # threads that start from now on
with running(sys.argv[2], {}, ServeConfig(port=0, model_id="m")) as server:
    files.clear(), types.clear()
    httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60).raise_for_status()
    seen = set(files), set(types)
files, types = seen
stop()
""",
}


def main(arguments: list[str]) -> int:
    """Prints the counts as one JSON object."""
    checkout, model, data = (Path(argument).resolve() for argument in arguments)
    found: dict[str, Any] = _sizes(checkout)
    with tempfile.TemporaryDirectory() as packages:
        Path(packages, "mlx_afm_cli").symlink_to(checkout / "cli")
        environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{packages}"}
        for name, source in WAYS.items():
            command = [sys.executable, "-c", TRACE + source, str(checkout), str(model), str(data)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            way = json.loads(done.stdout.splitlines()[-1])
            found[name] = {"files": len(way["files"]), "types": len(way["types"]), **way_names(way)}
    print(json.dumps(found, indent=1))
    return 0


def way_names(way: dict[str, list[str]]) -> dict[str, Any]:
    """The names behind the counts, one text each."""
    return {"which files": " ".join(way["files"]), "which types": " ".join(way["types"])}


def _sizes(checkout: Path) -> dict[str, Any]:
    files = sorted([*(checkout / "mlx_afm").rglob("*.py"), *(checkout / "cli").rglob("*.py")])
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    functions = [
        node.end_lineno - node.lineno + 1
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None
    ]
    return {
        "modules": len(files),
        "lines": sum(lines.values()),
        f"functions over {LONG_FUNCTION} lines": sum(length > LONG_FUNCTION for length in functions),
        f"modules under {SHORT_MODULE} lines": sum(
            count < SHORT_MODULE for file, count in lines.items() if file.name != "__init__.py"
        ),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
