"""Configurations: the toolkit's JSON and config.json, both ways, and what is refused."""

from __future__ import annotations

import json

import pytest

from mlx_afm.errors import ConfigError
from mlx_afm.model import AdapterSpec, AFMConfig, ToolkitConfig, parse_toolkit_config, to_toolkit_config

REAL = {
    "__tamm_type__": "models:AFMTextV7Config",
    "adapters": {"base_adapter": {"__tamm_type__": "adapters:LoRAModelAdapter", "alpha": 16, "rank": 32}},
    "arch_optimizers": {"kv_quant": {"__tamm_type__": "ao:KVQuantArchOptimizer", "freeze_qparams": True}},
}
DRAFT = {
    "__tamm_type__": "models:AFMTextV7Config",
    "hidden_dim": 256,
    "hidden_dim_scale_factor": 3.0,
    "num_heads": 8,
    "num_kv_heads": 4,
    "num_kv_reuse_layers": 0,
    "num_layers": 12,
}


def test_the_real_document():
    config = parse_toolkit_config(REAL, where="x")
    assert config == ToolkitConfig(model=AFMConfig(), adapter=AdapterSpec(name="base_adapter", rank=32, alpha=16))
    assert config.adapter.scale == 0.5
    assert len(json.dumps(to_toolkit_config(config), indent=2)) == 315  # the size reported of the toolkit's file


def test_the_draft_document():
    config = parse_toolkit_config(DRAFT, where="x")
    assert config.adapter is None
    assert not config.model.kv_quant
    assert config.model.feed_forward_dim == 768
    assert to_toolkit_config(config) == DRAFT


def test_both_namespaces_and_harmless_fields_are_read():
    document = {**REAL, "__tamm_type__": "tamm:module_configs:AFMTextV7Config", "sdpa_implementation": "auto"}
    assert parse_toolkit_config(document, where="x").model == AFMConfig()


def test_alpha_defaults_to_rank():
    adapters = {"a": {"__tamm_type__": "adapters:LoRAModelAdapter", "rank": 6}}
    assert parse_toolkit_config({**REAL, "adapters": adapters}, where="x").adapter.scale == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"__tamm_type__": "models:LlamaConfig"}, "expected AFMTextV7Config, found models:LlamaConfig"),
        ({"num_layer": 3}, "num_layer: unknown field; is it 'num_layers'"),
        ({"hidden_dropout_p": 0.1}, "hidden_dropout_p: only 0 is supported"),
        ({"num_heads": 3}, "hidden_dim 2048 is not a multiple of num_heads 3"),
        ({"num_kv_reuse_layers": 56}, "num_kv_reuse_layers: expected 0 to 55, found 56"),
        ({"num_heads": "16"}, "num_heads: expected a number, found '16'"),
        ({"adapters": [1]}, "adapters is not an object"),
        ({"adapters": {"a": {"__tamm_type__": "adapters:Houlsby"}}}, "expected LoRAModelAdapter"),
        ({"adapters": {"a": {**REAL["adapters"]["base_adapter"], "adapt_attention_keys": False}}}, "without k"),
        ({"arch_optimizers": {"q": {"__tamm_type__": "ao:Other"}}}, "expected KVQuantArchOptimizer"),
        (
            {"arch_optimizers": {"q": {**REAL["arch_optimizers"]["kv_quant"], "skip_quantize_for_first_token": True}}},
            "skip_quantize_for_first_token is not supported",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_toolkit_config({**REAL, **change}, where="base-model-config.json")


def test_not_an_object():
    with pytest.raises(ConfigError, match="here: not a JSON object"):
        parse_toolkit_config([1], where="here")


def test_config_json_round_trip():
    config = AFMConfig(hidden_dim=64, num_heads=4, num_layers=6, num_kv_reuse_layers=2)
    assert AFMConfig.from_dict({**config.to_dict(), "eos_token_id": [1]}) == config


def test_config_json_of_another_model_or_without_theta_is_refused():
    with pytest.raises(ConfigError, match="expected afm7, found llama"):
        AFMConfig.from_dict({"model_type": "llama"})
    values = AFMConfig().to_dict()
    values["rope_base"] = values.pop("rope_theta")  # mlx-lm would silently take 50000
    with pytest.raises(ConfigError, match="rope_theta"):
        AFMConfig.from_dict(values)
