"""Sizes of an AFM text v7 model, in the keys of an MLX `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mlx_afm.errors import ConfigError
from mlx_afm.spelling import nearest_name

MODEL_TYPE = "afm7"  # mlx-lm's name of the architecture
# Far above any model of this kind; a damaged file must not make us plan for billions of layers.
LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_dim": 1 << 20,
    "num_layers": 1000,
    "num_heads": 1 << 16,
    "num_kv_heads": 1 << 16,
}


@dataclass(frozen=True, kw_only=True)
class AFMConfig:
    """What determines the shape and the arithmetic of the model.

    The defaults are those of the 3.18 B parameter model; the names are mlx-lm's.

    Attributes:
        vocab_size: rows of the embedding, which is also the output head.
        hidden_dim: width of the residual stream.
        num_layers: all layers, those that reuse keys and values included.
        num_kv_reuse_layers: how many of the last layers attend to the keys and values of the last
            ordinary layer. 0 gives a uniform stack, the form of the draft model.
        num_heads: query heads; their width is hidden_dim / num_heads.
        num_kv_heads: key and value heads, each shared by num_heads / num_kv_heads query heads.
        hidden_dim_scale_factor: feed-forward width as a multiple of hidden_dim.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: epsilon of every norm.
        kv_quant: whether keys and values pass an 8-bit fake quantizer (the draft model's do not).

    Raises:
        ConfigError: sizes that do not fit each other; all of them in one error.
    """

    vocab_size: int = 153600
    hidden_dim: int = 2048
    num_layers: int = 56
    num_kv_reuse_layers: int = 21
    num_heads: int = 16
    num_kv_heads: int = 2
    hidden_dim_scale_factor: float = 3.25
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    kv_quant: bool = True

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise ConfigError("the model configuration does not fit together", details=faults)

    def _faults(self) -> Any:
        for field in fields(self):
            value, wanted = getattr(self, field.name), (int, float) if field.type == "float" else (int,)
            if field.name != "kv_quant" and (isinstance(value, bool) or not isinstance(value, wanted)):
                yield f"{field.name}: expected a number, found {value!r}"
                return
        for name, highest in LIMITS.items():
            if not 1 <= getattr(self, name) <= highest:
                yield f"{name}: expected from 1 to {highest}, found {getattr(self, name)}"
                return
        for name in ("hidden_dim_scale_factor", "rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                yield f"{name}: expected a finite number above 0, found {getattr(self, name)}"
                return
        if not 0 <= self.num_kv_reuse_layers < self.num_layers:
            yield f"num_kv_reuse_layers: expected 0 to {self.num_layers - 1}, found {self.num_kv_reuse_layers}"
        if self.hidden_dim % self.num_heads:
            yield f"hidden_dim {self.hidden_dim} is not a multiple of num_heads {self.num_heads}"
        elif self.head_dim % 2 or self.head_dim < 4:
            yield f"head width hidden_dim / num_heads: expected an even number from 4 on, found {self.head_dim}"
        if self.num_heads % self.num_kv_heads:
            yield f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
        if not 1 <= self.feed_forward_dim <= LIMITS["hidden_dim"]:
            yield f"feed-forward width hidden_dim * hidden_dim_scale_factor: found {self.feed_forward_dim}"

    @property
    def model_type(self) -> str:
        """mlx-lm's name of the architecture."""
        return MODEL_TYPE

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def feed_forward_dim(self) -> int:
        """Width of the feed-forward layers (Python's rounding, half to even)."""
        return round(self.hidden_dim * self.hidden_dim_scale_factor)

    @property
    def num_ordinary_layers(self) -> int:
        """Layers that make keys and values of their own."""
        return self.num_layers - self.num_kv_reuse_layers

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AFMConfig:
        """The configuration in an MLX `config.json`; keys that are not the architecture's are left alone.

        Raises:
            ConfigError: another `model_type`, or a size that is missing.
        """
        if values.get("model_type") != MODEL_TYPE:
            found = values.get("model_type")
            raise ConfigError("not an AFM text v7 model", where="model_type", expected=MODEL_TYPE, found=found)
        names = [field.name for field in fields(cls)]
        optional = {"rms_norm_eps", "kv_quant", "hidden_dim_scale_factor"}
        missing = [name for name in names if name not in values and name not in optional]
        if missing:
            # rope_theta too: mlx-lm's own default, 50000, is not the model's.
            near = {name: nearest_name(name, values) for name in missing}
            details = [name + (f" (is it {near[name]!r}?)" if near[name] else "") for name in missing]
            raise ConfigError("keys are missing in config.json", details=details)
        return cls(**{name: values[name] for name in names if name in values})

    def to_dict(self) -> dict[str, Any]:
        """The keys and values of an MLX `config.json`, `model_type` first."""
        return {"model_type": MODEL_TYPE, **asdict(self)}
