import json

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
