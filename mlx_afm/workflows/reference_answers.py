"""Prompts and our greedy answers, beside a package, for a program on a device to compare its own with.

`NAME.reference_answers.json`:

    adapterIdentifier         of the package
    maximumResponseTokens     length of the answers
    steps                     a list of {"instructions", "prompt", "answer"}

`docs/devices.md` has the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_afm.files import write_json
from mlx_afm.formats.fmadapter import Metadata
from mlx_afm.generation import generate
from mlx_afm.text.template import DEFAULT_SYSTEM
from mlx_afm.workflows.load import load

SUFFIX = ".reference_answers.json"
PROMPTS = (
    "Name three fruits.",
    "What is the capital of France?",
    "Write one sentence about the sea.",
)
MAX_TOKENS = 64


def write_reference_answers(package: Path, metadata: Metadata, model_folder: Path, prompts: Sequence[str]) -> Path:
    """Answers each prompt with the package's own values, greedily; returns the file written beside the package.

    Raises:
        ConfigError: the model has no tokenizer.

    Cost: the model in memory.
    """
    model, tokenizer = load(model_folder, package)
    steps = []
    for prompt in prompts:
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, {"role": "user", "content": prompt}]
        answer = generate(model, tokenizer, messages, max_tokens=MAX_TOKENS)
        steps.append({"instructions": DEFAULT_SYSTEM, "prompt": prompt, "answer": answer})
    content = {
        "adapterIdentifier": metadata.identifier,
        "maximumResponseTokens": MAX_TOKENS,
        "steps": steps,
    }
    path = package.with_name(package.stem + SUFFIX)
    write_json(path, content)
    return path
