"""The toolkit's `.pt` and the package: what they cannot hold is refused, all of it at once."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_afm.adapters import Adapter, LoRAConfig, adapter_shapes, read_adapter, write_adapter_package, write_adapter_pt
from mlx_afm.errors import AdapterError
from mlx_afm.formats.fmadapter import Metadata
from mlx_afm.formats.tensors import LazyTensor
from tiny import tiny_config

BASE = tiny_config()


def new_adapter(config: LoRAConfig) -> Adapter:
    shapes = adapter_shapes(BASE, config)
    return Adapter(config, BASE, {name: LazyTensor.of(np.ones(shape, np.float32)) for name, shape in shapes.items()})


def write(form, folder, adapter, **options):
    if form == "pt":
        write_adapter_pt(folder / "a.pt", adapter, **options)
    else:
        write_adapter_package(folder / "a.fmadapter", adapter, Metadata(name="a", rank=adapter.config.rank), **options)


@pytest.mark.parametrize("form", ["pt", "fmadapter"])
def test_what_a_form_cannot_hold_is_refused(form, tmp_path):
    config = LoRAConfig(rank=4, scale=2.0, targets=("q",), layers="ordinary")
    with pytest.raises(AdapterError) as error:
        write(form, tmp_path, new_adapter(config))
    assert error.value.details == (
        "expected every layer, found layers ordinary",
        "expected every projection, found it without k,v,o,gate,up,down",
        "expected scale 0.5, which it implies, found 2",
    )
    for kind, reason in (("dora", "magnitudes"), ("full", "not weights"), ("qat", "not weights")):
        with pytest.raises(AdapterError, match=reason):
            write(form, tmp_path, new_adapter(LoRAConfig(rank=4, fine_tune_type=kind)))
    assert list(tmp_path.iterdir()) == [], "half a file was left"


def test_a_pt_for_a_model_of_another_scale(tmp_path):
    adapter = new_adapter(LoRAConfig(rank=4, scale=2.0))
    write("pt", tmp_path, adapter, scale=2.0)
    assert read_adapter(tmp_path / "a.pt", BASE, 2.0).config == adapter.config


def test_further_files_appear_with_the_package_or_not_at_all(tmp_path):
    adapter = new_adapter(LoRAConfig(rank=4))
    write("fmadapter", tmp_path, adapter, add_files=lambda folder: (folder / "draft.mil").write_text("x"))
    assert (tmp_path / "a.fmadapter" / "draft.mil").read_text() == "x"

    def fail(folder):
        (folder / "draft.mil").write_text("y")
        raise AdapterError("no")

    with pytest.raises(AdapterError):
        write("fmadapter", tmp_path, adapter, add_files=fail)
    assert (tmp_path / "a.fmadapter" / "draft.mil").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["a.fmadapter"]
