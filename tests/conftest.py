"""One small model in every form it has on disk, made once. Tests read these folders and never change them."""

import json
import os
import shutil

import pytest

# MLX's CUDA backend multiplies float32 matrices in TF32 otherwise: errors of 3e-3 in logits, where tests allow 2e-5.
# It is read when MLX is first used, after this line.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from mlx_afm.adapters import (
    write_adapter_folder,
    write_adapter_package,
    write_adapter_pt,
)
from mlx_afm.formats.fmadapter import Metadata
from mlx_afm.model import AFMConfig
from mlx_afm.model_folder import ModelFolder
from mlx_afm.workflows.convert import convert
from mlx_afm.workflows.demo import ASSETS, write_toolkit_folder
from tiny import random_adapter


@pytest.fixture(scope="session")
def toolkit_folder(tmp_path_factory):
    """The bundled model as the toolkit ships its own."""
    return write_toolkit_folder(tmp_path_factory.mktemp("toolkit") / "assets")


@pytest.fixture(scope="session")
def model_folder(toolkit_folder, tmp_path_factory):
    """The same as an MLX folder."""
    return convert(toolkit_folder, tmp_path_factory.mktemp("model") / "mlx").folder


@pytest.fixture(scope="session")
def adapter_forms(model_folder, tmp_path_factory):
    """One adapter in the three forms: "folder", "pt", "fmadapter"."""
    adapter, folder = random_adapter(ModelFolder(model_folder).config), tmp_path_factory.mktemp("adapters")
    write_adapter_folder(folder / "adapter", adapter)
    write_adapter_pt(folder / "adapter.pt", adapter)
    package = write_adapter_package(folder / "box.fmadapter", adapter, Metadata(name="box", rank=32))
    return {"folder": folder / "adapter", "pt": folder / "adapter.pt", "fmadapter": package}


@pytest.fixture(scope="session")
def other_adapter(tmp_path_factory):
    """An adapter folder for a model of other sizes."""
    base = AFMConfig(vocab_size=512, hidden_dim=64, num_layers=5, num_kv_reuse_layers=2, num_heads=4)
    folder = tmp_path_factory.mktemp("other") / "adapter"
    write_adapter_folder(folder, random_adapter(base))
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """20 examples to train on, 4 to validate, 4 to test."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 20), ("valid", 4), ("test", 4)):
        lines = (ASSETS / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def copy_of(tmp_path):
    """A function that copies a folder into the test's own, to be damaged there."""

    def copy(folder, name=None):
        target = tmp_path / (name or folder.name)
        shutil.copytree(folder, target)
        return target

    return copy


@pytest.fixture
def edit_json():
    """A function that changes keys of a JSON file; None removes one."""

    def edit(path, **changes):
        values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return edit
