"""What a cold process imports before its first token."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import mlx_afm
model, tokenizer = mlx_afm.load(sys.argv[1])
print(repr(mlx_afm.generate(model, tokenizer, "copy vome.go", max_tokens=4)))
print(sorted({name.partition(".")[0] for name in sys.modules} & {"mlx_lm", "torch", "transformers"}))
"""


def test_an_answer_needs_none_of_the_large_libraries(model_folder):
    """They take seconds to import; sampling with top-p, top-k or min-p takes mlx-lm's functions, and only that."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, model_folder], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
