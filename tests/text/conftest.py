import os
from pathlib import Path

import pytest
from sentencepiece_models import TRAINED, model_bytes, toy_pieces

from mlx_afm.text.tokenizer import AFMTokenizer


@pytest.fixture(scope="session")
def model_files(tmp_path_factory):
    """Name to path of a `tokenizer.model`."""
    files = {}
    for name, build in {"toy": lambda: model_bytes(toy_pieces()), **TRAINED}.items():
        files[name] = tmp_path_factory.mktemp(name) / "tokenizer.model"
        files[name].write_bytes(build())
    return files


@pytest.fixture(scope="session")
def toy(model_files):
    return AFMTokenizer.from_file(model_files["toy"])


@pytest.fixture(scope="session", params=list(TRAINED))
def model_file(request, model_files):
    return model_files[request.param]


@pytest.fixture(scope="session")
def tokenizer(model_file):
    return AFMTokenizer.from_file(model_file)


@pytest.fixture(scope="session")
def tldr_files():
    """The parts of the tldr data set, which does not belong to the repository."""
    beside = Path(__file__).parents[3] / "shared"
    folder = Path(os.environ.get("MLX_AFM_SHARED", beside)) / "data"
    files = {split: folder / f"tldr_{split}.jsonl" for split in ("train", "valid", "test")}
    if missing := [path.name for path in files.values() if not path.is_file()]:
        pytest.skip(f"no data set: {', '.join(missing)} is in neither $MLX_AFM_SHARED/data nor beside the checkout")
    return files


@pytest.fixture(scope="session")
def tldr_file(tldr_files):
    """Its validation part."""
    return tldr_files["valid"]
