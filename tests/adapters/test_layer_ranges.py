"""Layer ranges: text to layers, for a model of 3 ordinary and 2 reuse layers and for the real one."""

from __future__ import annotations

import pytest

from mlx_afm.adapters import LoRAConfig, adapter_shapes, adapter_weights, add_adapter
from mlx_afm.adapters.layers import chosen_layers, layer_of
from mlx_afm.errors import ConfigError
from mlx_afm.model import AFMConfig
from tiny import tiny_config, tiny_model


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", {0, 1, 2, 3, 4}),
        ("ordinary", {0, 1, 2}),
        ("reuse", {3, 4}),
        ("last-2", {3, 4}),
        ("last-5", {0, 1, 2, 3, 4}),
        ("0-2", {0, 1, 2}),
        ("4", {4}),
        ("0, 2-3", {0, 2, 3}),
        ("reuse,0", {0, 3, 4}),
    ],
)
def test_what_a_text_means(text, layers):
    assert chosen_layers(LoRAConfig(layers=text).layers, tiny_config()) == layers


def test_the_real_models_segments():
    base = AFMConfig()
    assert chosen_layers("0-34", base) == chosen_layers("ordinary", base)
    assert chosen_layers("35-55", base) == chosen_layers("reuse", base) == chosen_layers("last-21", base)


@pytest.mark.parametrize("text", ["", "first", "3-", "-3", "last-", "0;1", "1.5", 3, "٣"])
def test_texts_that_mean_nothing(text):
    found = repr(text or "nothing")
    with pytest.raises(ConfigError, match=f"layers: expected all, ordinary.*, found {found}"):
        LoRAConfig(layers=text)


@pytest.mark.parametrize("text", ["5", "0-5", "last-6", "last-0", "3-2"])
def test_layers_that_are_not_there(text):
    with pytest.raises(ConfigError, match=r"no such layers \(expected some of 0-4 \(3 ordinary, 2 reuse\)"):
        chosen_layers(LoRAConfig(layers=text).layers, tiny_config())
    with pytest.raises(ConfigError, match="no such layers"):
        add_adapter(tiny_model(), LoRAConfig(layers=text))


def test_a_uniform_stack_has_no_reuse_layers():
    with pytest.raises(ConfigError, match="no such layers"):
        chosen_layers("reuse", tiny_config(num_kv_reuse_layers=0))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_adapter_sits_there_and_nowhere_else(kind):
    base, config = tiny_config(), LoRAConfig(rank=2, layers="1,reuse", targets=("v", "o"), fine_tune_type=kind)
    model = tiny_model()
    add_adapter(model, config)
    shapes = {name: tuple(array.shape) for name, array in adapter_weights(model).items()}
    assert shapes == adapter_shapes(base, config)
    assert {layer_of(name, base) for name in shapes} == {1, 3, 4}
    assert layer_of("model.embedding.weight", base) is None
