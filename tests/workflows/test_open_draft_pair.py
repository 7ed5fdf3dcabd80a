"""The draft pair from a toolkit folder."""

import json

import numpy as np
import pytest

from draft_fixtures import draft_state, write_draft_assets
from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.formats.torch_file import write_torch
from mlx_afm.workflows.draft_pair import ASSETS, open_draft_pair, read_yaml


@pytest.fixture
def assets(tmp_path):
    return write_draft_assets(tmp_path / "toolkit" / "assets")


@pytest.mark.parametrize("at", ["toolkit", "toolkit/assets"])
def test_the_toolkits_folder_or_its_assets(at, assets, tmp_path):
    pair = open_draft_pair(tmp_path / at, assets.checkpoint)
    assert pair.surplus == ()
    assert {item.name for item in pair.spec} == set(pair.tensors)


@pytest.mark.parametrize("name", ASSETS)
def test_a_missing_asset_is_named(name, assets, tmp_path):
    (assets.folder / name).unlink()
    with pytest.raises(FormatError, match=f"missing {name.replace('.', '[.]')}|missing .*{name}"):
        open_draft_pair(tmp_path / "toolkit" / "assets", assets.checkpoint)


def test_a_bfloat16_checkpoint_is_read(assets, tmp_path):
    rounded = {name: (values.view(np.uint32) >> 16).astype(np.uint16) for name, values in draft_state().items()}
    tensors = {name: LazyTensor("bfloat16", bits.shape, lambda b=bits: b) for name, bits in rounded.items()}
    write_torch(tmp_path / "draft.pt", tensors, aliases={"output_transform.weight": "embedding.weight"})
    pair = open_draft_pair(assets.folder, tmp_path / "draft.pt")
    values = pair.tensors["decoder.output_norm.scale"].read_values()
    np.testing.assert_array_equal(values, (rounded["output_norm.weight"].astype(np.uint32) << 16).view(np.float32))


def test_heads_come_from_the_models_json(assets):
    config = json.loads((assets.folder / "draft-model-config.json").read_text())
    (assets.folder / "draft-model-config.json").write_text(json.dumps({**config, "num_kv_heads": 4}))
    with pytest.raises(FormatError, match="not a fused projection of these heads"):
        open_draft_pair(assets.folder, assets.checkpoint)
    (assets.folder / "draft-model-config.json").write_text('{"__tamm_type__": "models:Other"}')
    with pytest.raises(ConfigError, match="AFMTextV7Config"):
        open_draft_pair(assets.folder, assets.checkpoint)


HOSTILE = {
    "alias": ("a: &x [1]\nb: *x\n", "line 2: an alias"),
    "bomb": ("a: &a [1,1]\nb: &b [*a,*a]\nc: &c [*b,*b]\n", "an alias"),
    "twice": ("weights_mapping: {}\nweights_mapping: {}\n", "a key occurs twice"),
    "deep twice": ("a:\n  - {b: 1, b: 2}\n", "a key occurs twice"),
    "tag": ("a: !!python/object/apply:os.system [echo]\n", "not YAML"),
    "broken": ("a: [1\n", "not YAML"),
    "nested": ("[" * 5000, "not YAML"),
    "bytes": ("a: \xff\n", "not YAML"),
    "two": ("a: 1\n---\nb: 2\n", "not YAML"),
    "key": ("? [1, 2]\n: 3\n", "not YAML"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_one_error(case, tmp_path):
    text, says = HOSTILE[case]
    path = tmp_path / "checkpoint_spec.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError) as error:
        read_yaml(path)
    assert says in str(error.value)
    assert str(path) in str(error.value)


def test_a_huge_spec_is_refused(tmp_path):
    path = tmp_path / "checkpoint_spec.yaml"
    path.write_bytes(b"a: 1\n" + b"#" * (5 << 20))
    with pytest.raises(FormatError, match="more than"):
        read_yaml(path)
