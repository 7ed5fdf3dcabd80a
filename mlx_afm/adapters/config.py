"""What an adapter is: rank, scale, and which projections it sits on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_afm.checkpoints.names import TARGETS
from mlx_afm.errors import AdapterError, ConfigError
from mlx_afm.model import AFMConfig

DEFAULT_SCALE = 0.5  # of an adapter file that carries none: alpha 16 at rank 32


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Form of a LoRA adapter.

    Attributes:
        rank: inner dimension.
        scale: factor of the update, alpha / rank elsewhere. Devices always apply 0.5.
        dropout: of the update's input, in training.
        targets: which projections: q, k, v, o (attention output), gate, up, down.

    Raises:
        ConfigError: settings out of range.
    """

    rank: int = 32
    scale: float = DEFAULT_SCALE
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        faults = []
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            faults.append(f"rank: expected a whole number from 1 on, found {self.rank!r}")
        if not isinstance(self.scale, (int, float)) or not self.scale > 0:
            faults.append(f"scale: expected more than 0, found {self.scale!r}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            faults.append(f"dropout: expected from 0 to less than 1, found {self.dropout!r}")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            faults.append(
                f"targets: expected some of {','.join(TARGETS)}, found {','.join(map(str, self.targets)) or 'none'}"
            )
        if faults:
            raise ConfigError("the adapter's settings are out of range", details=faults)


def to_adapter_json(config: LoRAConfig, model: AFMConfig, toolkit_name: str) -> dict[str, Any]:
    """Content of `adapter_config.json`: mlx-lm's keys, the sizes of the base, the id in the toolkit's names."""
    parameters: dict[str, Any] = {"rank": config.rank, "scale": config.scale, "dropout": config.dropout}
    if set(config.targets) != set(TARGETS):
        parameters["targets"] = list(config.targets)
    return {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": parameters,
        "base_model": model.to_dict(),
        "toolkit_name": toolkit_name,
    }


def parse_adapter_json(values: Any, *, where: object) -> tuple[LoRAConfig, AFMConfig | None]:
    """The adapter's form and, if it says so, the sizes of its base.

    Raises:
        AdapterError: not a LoRA adapter, or settings missing or out of range.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("lora_parameters"), Mapping):
        raise AdapterError("not an adapter configuration", where=where, expected="an object with lora_parameters")
    kind = values.get("fine_tune_type", "lora")
    if kind != "lora":
        raise AdapterError("not a LoRA adapter", where=where, expected="fine_tune_type lora", found=kind)
    parameters = values["lora_parameters"]
    missing = [name for name in ("rank", "scale") if name not in parameters]
    if missing:
        raise AdapterError(f"lora_parameters without {' and '.join(missing)}", where=where)
    targets, base = parameters.get("targets", TARGETS), values.get("base_model")
    if not isinstance(targets, (list, tuple)) or not isinstance(base, (Mapping, type(None))):
        expected = "targets a list and base_model an object"
        raise AdapterError("not an adapter configuration", where=where, expected=expected)
    try:
        config = LoRAConfig(
            rank=parameters["rank"],
            scale=parameters["scale"],
            dropout=parameters.get("dropout", 0.0),
            targets=tuple(targets),
        )
        return config, None if base is None else AFMConfig.from_dict(base)
    except (ConfigError, TypeError) as error:
        raise AdapterError(f"cannot be used: {error}", where=where) from error
