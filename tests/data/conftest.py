import json
import os
from pathlib import Path

import pytest

from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.workflows.demo import ASSETS


@pytest.fixture(scope="session")
def tokenizer_file():
    return ASSETS / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    return AFMTokenizer.from_file(tokenizer_file)


@pytest.fixture
def write(tmp_path):
    """Writes lines to a file of the test's folder: values as JSON, texts and bytes as they are."""

    def write_lines(name, *lines):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded = [
            line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line) + "\n").encode()
            for line in lines
        ]
        path.write_bytes(b"".join(encoded))
        return path

    return write_lines


@pytest.fixture(scope="session")
def tldr_train():
    """The training part of the tldr data set, which does not belong to the repository."""
    beside = Path(__file__).parents[3] / "shared"
    path = Path(os.environ.get("MLX_AFM_SHARED", beside)) / "data" / "tldr_train.jsonl"
    if not path.is_file():
        pytest.skip(f"no data set: {path.name} is in neither $MLX_AFM_SHARED/data nor beside the checkout")
    return path
