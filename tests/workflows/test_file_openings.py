"""What a start opens: each file of the model and of the adapter once.

Python tells of every file that it opens. MLX opens the weights by itself to read their values, which is not told.
"""

import json
import subprocess
import sys

import pytest

COUNT = """
import json, os, sys
from collections import Counter
roots, opened = [os.path.realpath(root) for root in json.loads(sys.argv[1])], Counter()

def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[1] is not None:
        path = os.path.realpath(arguments[0])
        if any(path.startswith(root + os.sep) for root in roots) and os.path.isfile(path):
            opened[os.path.relpath(path, next(root for root in roots if path.startswith(root + os.sep)))] += 1

sys.addaudithook(note)
"""
STARTS = {
    "generate": """
import mlx_afm
model, tokenizer = mlx_afm.load(*json.loads(sys.argv[1]))
mlx_afm.generate(model, tokenizer, "copy abc", max_tokens=2)
""",
    "lora": """
import mlx_afm, tempfile
from mlx_afm.training import TrainConfig
model, data = json.loads(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    mlx_afm.train(mlx_afm.LoRAJob(model=model, data=data, adapter_path=folder, train=TrainConfig(iters=1), cache=None))
opened = Counter({name: count for name, count in opened.items() if not name.endswith(".jsonl")})
""",
    "serve": """
from mlx_afm.serving import ServeConfig, running
model, adapter = json.loads(sys.argv[1])
with running(model, {"a": adapter}, ServeConfig(port=0)):
    started = dict(opened)
opened = started
""",
}


@pytest.mark.parametrize("start", STARTS)
def test_each_file_is_opened_once(start, model_folder, adapter_forms, data_folder):
    roots = [str(model_folder), str(data_folder if start == "lora" else adapter_forms["folder"])]
    source = COUNT + STARTS[start] + "\nprint(json.dumps(opened))"
    done = subprocess.run(
        [sys.executable, "-c", source, json.dumps(roots)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    opened = json.loads(done.stdout.splitlines()[-1])
    assert {"config.json", "tokenizer.model", "model.safetensors"} <= set(opened)
    assert {name: count for name, count in opened.items() if count > 1} == {}
