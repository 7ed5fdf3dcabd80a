"""What an adapter is: its kind, rank, scale, and which projections of which layers it sits on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Any

from mlx_afm.adapters.layers import ALL, layer_faults
from mlx_afm.checkpoints.names import PROJECTIONS, QKV, TARGETS, Q
from mlx_afm.errors import AdapterError, ConfigError, SettingError
from mlx_afm.model import AFMConfig
from mlx_afm.text.system_prompt import SYSTEM_PROMPTS, SystemPrompts

DEFAULT_SCALE = 0.5  # of an adapter file that carries none: alpha 16 at rank 32
# The modules of a layer as mlx-lm's `keys` name them, and the targets on them.
MODULES = {projection.ours: projection.target for projection in PROJECTIONS}
_BOTH_Q = {QKV.ours, Q.ours}
FINE_TUNE_TYPES = ("lora", "dora", "full", "qat")
WHOLE_WEIGHTS = ("full", "qat")  # no low-rank update: rank, scale and dropout mean nothing


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Form of an adapter.

    Attributes:
        rank: inner dimension.
        scale: factor of the update, alpha / rank elsewhere. Devices always apply 0.5.
        dropout: of the update's input, in training.
        targets: which projections: q, k, v, o (attention output), gate, up, down.
        layers: which layers: all, ordinary, reuse, last-N, or ranges such as 0-34.
        fine_tune_type: lora; dora (low-rank update and the lengths of the weight's rows); full: all
            weights of the chosen layers, with embedding and last norm if these are all; or qat: the chosen
            projections learn to be in balanced 2-bit codes, the embedding in 4 bits. Of the last two rank,
            scale and dropout mean nothing.
        alpha: instead of `scale`, which becomes alpha / rank.
        use_rslora: `scale` becomes alpha / sqrt(rank), as rank-stabilised LoRA has it.

    Raises:
        SettingError: settings out of range.
    """

    rank: int = 32
    scale: float = DEFAULT_SCALE
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    layers: str = ALL
    fine_tune_type: str = "lora"
    alpha: InitVar[float | None] = None
    use_rslora: InitVar[bool] = False

    def __post_init__(self, alpha: float | None, use_rslora: bool) -> None:
        faults = []
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            faults.append(f"rank: expected a whole number from 1 on, found {self.rank!r}")
        elif alpha is not None:
            faults += self._set_scale(alpha, use_rslora)
        elif use_rslora:
            faults.append("use_rslora: expected with alpha, since it is what alpha is divided by")
        if not isinstance(self.scale, (int, float)) or not 0 < self.scale < math.inf:
            faults.append(f"scale: expected more than 0, found {self.scale!r}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            faults.append(f"dropout: expected from 0 to less than 1, found {self.dropout!r}")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            faults.append(
                f"targets: expected some of {','.join(TARGETS)}, found {','.join(map(str, self.targets)) or 'none'}"
            )
        faults += layer_faults(self.layers)
        if self.fine_tune_type not in FINE_TUNE_TYPES:
            faults.append(f"fine_tune_type: expected one of {', '.join(FINE_TUNE_TYPES)}, found {self.fine_tune_type}")
        elif self.fine_tune_type == "full" and set(self.targets) != set(TARGETS):
            faults.append("targets: full fine-tuning takes whole layers; choose them with layers")
        elif self.fine_tune_type == "qat" and 0 < len({"q", "k", "v"} & set(self.targets)) < 3:
            faults.append("targets: q, k and v are one matrix of codes; qat takes all of them or none")
        if faults:
            raise SettingError("the adapter's settings are out of range", details=faults)

    def _set_scale(self, alpha: float, use_rslora: bool) -> list[str]:
        if self.scale != DEFAULT_SCALE:
            return [f"alpha: expected alpha or scale, found alpha {alpha} and scale {self.scale}"]
        if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            return [f"alpha: expected more than 0, found {alpha!r}"]
        object.__setattr__(self, "scale", alpha / (math.sqrt(self.rank) if use_rslora else self.rank))
        return []


def to_adapter_json(
    config: LoRAConfig, model: AFMConfig, toolkit_name: str, system_prompts: SystemPrompts = ()
) -> dict[str, Any]:
    """Content of `adapter_config.json`: mlx-lm's keys, the sizes of the base, the id in the toolkit's names.

    With the system prompts of the training data, if they are known (see `mlx_afm.text.system_prompt`).
    """
    parameters: dict[str, Any] = {"rank": config.rank, "scale": config.scale, "dropout": config.dropout}
    if set(config.targets) != set(TARGETS):
        parameters["targets"] = list(config.targets)
    if config.layers != ALL:
        parameters["layers"] = config.layers
    return {
        "fine_tune_type": config.fine_tune_type,
        "num_layers": -1,
        "lora_parameters": parameters,
        "base_model": model.to_dict(),
        "toolkit_name": toolkit_name,
        **({SYSTEM_PROMPTS: list(system_prompts)} if system_prompts else {}),
    }


def parse_adapter_json(values: Any, *, where: object) -> tuple[LoRAConfig, AFMConfig | None]:
    """The adapter's form and, if it says so, the sizes of its base.

    Of a configuration that mlx-lm wrote, `num_layers` (the last layers) and `keys` (modules of a layer) are honoured.

    Raises:
        AdapterError: not an adapter we know, or settings missing or out of range.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("lora_parameters"), Mapping):
        raise AdapterError("not an adapter configuration", where=where, expected="an object with lora_parameters")
    kind = values.get("fine_tune_type", "lora")
    if kind not in FINE_TUNE_TYPES:
        expected = f"fine_tune_type {', '.join(FINE_TUNE_TYPES)}"
        raise AdapterError("an adapter of another kind", where=where, expected=expected, found=kind)
    parameters = values["lora_parameters"]
    missing = [name for name in ("rank", "scale") if name not in parameters and kind not in WHOLE_WEIGHTS]
    if missing:
        raise AdapterError(f"lora_parameters without {' and '.join(missing)}", where=where)
    given_layers = parameters.get("layers")
    layers = _layers_of(values.get("num_layers"), where) if given_layers is None else given_layers
    targets, base = parameters.get("targets", TARGETS), values.get("base_model")
    if parameters.get("keys") is not None and "targets" not in parameters:
        targets, layers = _modules_of(parameters["keys"], layers, where)
    if not isinstance(targets, (list, tuple)) or not isinstance(base, (Mapping, type(None))):
        expected = "targets a list and base_model an object"
        raise AdapterError("not an adapter configuration", where=where, expected=expected)
    try:
        given = {name: parameters[name] for name in ("rank", "scale", "dropout") if name in parameters}
        config = LoRAConfig(**given, targets=tuple(targets), layers=layers, fine_tune_type=kind)
        return config, None if base is None else AFMConfig.from_dict(base)
    except (ConfigError, TypeError) as error:
        raise AdapterError(f"cannot be used: {error}", where=where) from error


def _layers_of(num_layers: Any, where: object) -> str:
    """The layers that mlx-lm's `num_layers` means: the last ones; all if it is absent, 0 or less."""
    if num_layers is None:
        return ALL
    if isinstance(num_layers, bool) or not isinstance(num_layers, int):
        raise AdapterError("num_layers is not a whole number", where=where, found=repr(num_layers))
    return f"last-{num_layers}" if num_layers > 0 else ALL


def _modules_of(keys: Any, layers: str, where: object) -> tuple[tuple[str, ...], str]:
    """The targets and layers that mlx-lm's `keys` mean.

    Raises:
        AdapterError: modules that this model does not have, or a choice that targets and layers cannot say.
    """
    known = ", ".join(MODULES)
    if not isinstance(keys, (list, tuple)) or not keys or not all(isinstance(key, str) for key in keys):
        raise AdapterError("keys is not a list of module names", where=where, expected=f"some of {known}", found=keys)
    unknown = [key for key in keys if key not in MODULES]
    if unknown:
        what = "keys with modules that the layers of this model do not have"
        raise AdapterError(what, where=where, expected=f"some of {known}", found=", ".join(unknown))
    chosen = {target for key in keys for target in MODULES[key]}
    targets = tuple(target for target in TARGETS if target in chosen)
    q_modules = _BOTH_Q & set(keys)
    if len(q_modules) != 1:
        return targets, layers
    # Layers that reuse keys and values have q_proj, the others qkv_proj; our target q means both.
    if set(keys) == q_modules and layers == ALL:
        return targets, "ordinary" if q_modules == {QKV.ours} else "reuse"
    advice = "Train again with both of these keys, or without keys."
    expected = f"{QKV.ours} and {Q.ours}, or neither"
    raise AdapterError(
        "keys that mlx-afm cannot load", where=where, expected=expected, found=", ".join(keys), advice=advice
    )
