"""The toolkit's JSON model configuration, read and written.

A document is one object with a `__tamm_type__` of the form `namespace:ClassName`; only fields that
differ from the defaults are present. Fields that cannot change what the model computes are allowed
and kept with the original text; whatever would change it and is not supported here is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_afm.errors import ConfigError
from mlx_afm.model.config import AFMConfig
from mlx_afm.spelling import nearest_name

TYPE_KEY = "__tamm_type__"
# Toolkit field -> AFMConfig field; the names agree.
SIZE_FIELDS = (
    "vocab_size",
    "hidden_dim",
    "num_layers",
    "num_kv_reuse_layers",
    "num_heads",
    "num_kv_heads",
    "hidden_dim_scale_factor",
    "rope_theta",
)
HARMLESS_FIELDS = {
    "active_adapter",
    "pretrained_path",
    "pretrained",
    "device",
    "dtype",
    "freeze_params",
    "metadata",
    "include_loss_layer",
    "output_hidden_states",
    "output_attentions",
    "sdpa_implementation",
}
ZERO_FIELDS = {"attention_dropout_p", "hidden_dropout_p"}
KNOWN_FIELDS = {*SIZE_FIELDS, *HARMLESS_FIELDS, *ZERO_FIELDS, "adapters", "arch_optimizers", TYPE_KEY}
ADAPT_FLAGS = {
    "adapt_attention_queries": "q",
    "adapt_attention_keys": "k",
    "adapt_attention_values": "v",
    "adapt_attention_outputs": "o",
    "adapt_feed_forward_hidden_states": "gate,up",
    "adapt_feed_forward_outputs": "down",
}


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """The LoRA adapter a toolkit model carries.

    Attributes:
        name: its id, part of every tensor name.
        rank: inner dimension.
        alpha: the update is scaled by alpha / rank.
    """

    name: str
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """Factor of the low-rank update."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class ToolkitConfig:
    """What the toolkit's JSON says: the model, and the adapter inside it if there is one."""

    model: AFMConfig
    adapter: AdapterSpec | None


def parse_toolkit_config(document: Any, *, where: object) -> ToolkitConfig:
    """The configuration in a toolkit JSON document.

    Raises:
        ConfigError: not an AFM text v7 configuration, or a field we do not know or cannot honour.
    """
    if not isinstance(document, Mapping):
        raise ConfigError("not a JSON object", where=where, found=type(document).__name__)
    _require_type(document, "AFMTextV7Config", where)
    _require_known(document, where)
    sizes = {name: document[name] for name in SIZE_FIELDS if name in document}
    kv_quant = _has_kv_quantizer(document, where)
    try:
        model = AFMConfig(**sizes, kv_quant=kv_quant)
    except ConfigError as error:
        raise ConfigError(error.what, where=where, details=error.details) from None
    return ToolkitConfig(model=model, adapter=_parse_adapter(document, where))


def to_toolkit_config(config: ToolkitConfig) -> dict[str, Any]:
    """The JSON document of a configuration: only what differs from the toolkit's defaults."""
    defaults = AFMConfig()
    document: dict[str, Any] = {TYPE_KEY: "models:AFMTextV7Config"}
    if config.adapter is not None:
        lora = {
            TYPE_KEY: "adapters:LoRAModelAdapter",
            "alpha": _plain(config.adapter.alpha),
            "rank": config.adapter.rank,
        }
        document["adapters"] = {config.adapter.name: lora}
    if config.model.kv_quant:
        document["arch_optimizers"] = {"kv_quant": {TYPE_KEY: "ao:KVQuantArchOptimizer", "freeze_qparams": True}}
    for name in sorted(SIZE_FIELDS):
        if getattr(config.model, name) != getattr(defaults, name):
            document[name] = getattr(config.model, name)
    return document


def _plain(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _require_type(document: Mapping[str, Any], wanted: str, where: object) -> None:
    found = document.get(TYPE_KEY)
    if not isinstance(found, str) or found.split(":")[-1] != wanted:
        advice = "Only AFM text v7 models, the toolkit's 26.0.0 among them, can be read."
        raise ConfigError(f"wrong {TYPE_KEY}", where=where, expected=wanted, found=found, advice=advice)


def _require_known(document: Mapping[str, Any], where: object) -> None:
    faults = []
    for name in document:
        if name not in KNOWN_FIELDS:
            near = nearest_name(name, KNOWN_FIELDS)
            faults.append(f"{name}: unknown field" + (f"; is it {near!r}?" if near else ""))
        elif name in ZERO_FIELDS and document[name]:
            faults.append(f"{name}: only 0 is supported, found {document[name]}")
    if faults:
        raise ConfigError("fields that cannot be honoured", where=where, details=faults)


def _has_kv_quantizer(document: Mapping[str, Any], where: object) -> bool:
    optimizers = document.get("arch_optimizers") or {}
    if not isinstance(optimizers, Mapping) or not all(isinstance(item, Mapping) for item in optimizers.values()):
        raise ConfigError("arch_optimizers is not an object of objects", where=where)
    for item in optimizers.values():
        _require_type(item, "KVQuantArchOptimizer", where)
        if item.get("skip_quantize_for_first_token"):
            raise ConfigError("skip_quantize_for_first_token is not supported", where=where)
    if len(optimizers) > 1:
        raise ConfigError("more than one arch optimizer", where=where, found=sorted(optimizers))
    return bool(optimizers)


def _parse_adapter(document: Mapping[str, Any], where: object) -> AdapterSpec | None:
    adapters = document.get("adapters") or {}
    if not isinstance(adapters, Mapping) or not all(isinstance(item, Mapping) for item in adapters.values()):
        raise ConfigError("adapters is not an object of objects", where=where)
    if not adapters:
        return None
    if len(adapters) > 1:
        raise ConfigError("more than one adapter", where=where, expected="one", found=sorted(adapters))
    name, item = next(iter(adapters.items()))
    _require_type(item, "LoRAModelAdapter", where)
    left_out = [parts for flag, parts in ADAPT_FLAGS.items() if item.get(flag) is False]
    if left_out or item.get("layer_pattern") is not None:
        found = f"without {','.join(left_out)}" if left_out else f"layer_pattern {item['layer_pattern']!r}"
        raise ConfigError("an adapter on part of the model", where=where, expected="all projections", found=found)
    rank = item.get("rank", 8)
    alpha = item.get("alpha")
    alpha = rank if alpha is None else alpha
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not whole or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ConfigError("rank and alpha must be positive numbers", where=where, found=f"rank {rank}, alpha {alpha}")
    return AdapterSpec(name=name, rank=rank, alpha=alpha)
