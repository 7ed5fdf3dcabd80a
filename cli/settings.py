"""Defaults < YAML file < flags, merged once into a `LoRAJob`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from mlx_afm.adapters import LoRAConfig
from mlx_afm.errors import ConfigError
from mlx_afm.training import TrainConfig
from mlx_afm.training.config import OPTIMIZERS
from mlx_afm.workflows.lora import LoRAJob

from .data_options import FIELDS as DATA_FIELDS
from .data_options import reading_from

LORA_KEYS = {field.name for field in fields(LoRAConfig)} | {"alpha", "use_rslora"}
TRAIN_KEYS = {field.name for field in fields(TrainConfig)}
JOB_KEYS = {"model", "data", "adapter_path", "name", "resume_adapter_file", "project_name", "no_cache", *DATA_FIELDS}
JOB_KEYS |= {"sample_prompt", "sample_tokens", "report_to", "ignore_memory", "no_system_prompt"}
JOB_DEFAULTS = ("sample_tokens", "report_to", "project_name", "ignore_memory")
SAME = (("alpha", "scale"), ("layers", "num_layers"), ("system_prompt", "no_system_prompt"))  # two ways to say it
DERIVED_KEYS = {"num_layers": "int", "loraplus_ratio": "float"}  # other ways to say layers and rate_factors
SWITCHES = {"train", "test", "resume"}
KNOWN = LORA_KEYS | TRAIN_KEYS | JOB_KEYS | SWITCHES | set(DERIVED_KEYS) | {"lora_parameters"}
# What a file may give for an option, by the type of its field.
KINDS = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "text"),
    "bool": ((bool,), "true or false"),
    "tuple[str, ...]": ((list, str), "a list of names, or names with commas between"),
    "texts": ((list, str), "a text, or a list of texts"),
    "Mapping[str, Any]": ((dict,), "a mapping of settings"),
    "Mapping[str, float]": ((dict,), "a mapping of settings"),
}
LISTS = ("targets", "no_decay", "report_to")
TYPES = {
    **dict.fromkeys(JOB_KEYS, "str"),
    **dict.fromkeys(SWITCHES, "bool"),
    **{field.name: str(field.type).removesuffix(" | None") for field in (*fields(LoRAConfig), *fields(TrainConfig))},
    **dict.fromkeys(("max_seq_length", "sample_tokens"), "int"),
    **DERIVED_KEYS,
    "alpha": "float",
    "use_rslora": "bool",
    **dict.fromkeys(("sample_prompt", "field"), "texts"),
    **dict.fromkeys(("no_cache", "ignore_memory", "no_system_prompt"), "bool"),
    "report_to": "tuple[str, ...]",
}


@dataclass(frozen=True)
class Request:
    """What `mlx-afm lora` is asked to do: train (--resume asks for it too), test or both.

    `adapter_given` says whether there was an adapter path, `system_given` whether there was a system prompt.
    """

    job: LoRAJob
    train: bool
    test: bool
    adapter_given: bool
    system_given: bool


def request_from(file: Path | None, flags: Mapping[str, Any], required: tuple[str, ...] = ("model", "data")) -> Request:
    """What file and flags ask for together.

    Args:
        file: YAML.
        flags: of the command line.
        required: what must be given; a path that is not given is the empty one.

    Raises:
        ConfigError: a file that cannot be read or keys we do not know. UsageError: no model or no data.
    """
    values = {} if file is None else read_settings(file)
    switches = {name: bool(values.pop(name, False) or flags.get(name)) for name in SWITCHES}
    given = {name: value for name, value in flags.items() if value not in (None, ()) and name not in SWITCHES}
    for one, other in [pair for ways in SAME for pair in (ways, ways[::-1])]:
        if one in given and other not in given:
            values.pop(other, None)  # a flag wins over the other way of saying it in the file
    values |= given
    missing = [f"--{name}" for name in required if not values.get(name)]
    if missing:
        raise click.UsageError(f"missing {' and '.join(missing)}")
    _resolve(values)
    if values.get("iters") is not None and flags.get("epochs") is not None and flags.get("iters") is None:
        values["iters"] = None  # --epochs on the command line wins over iters in the file
    job = LoRAJob(
        model=Path(values.get("model", "")),
        data=Path(values.get("data", "")),
        adapter_path=Path(values.get("adapter_path", "adapters")),
        lora=LoRAConfig(**{name: values[name] for name in LORA_KEYS & values.keys()}),
        train=TrainConfig(**{name: values[name] for name in TRAIN_KEYS & values.keys()}),
        name=values.get("name"),
        test=switches["test"],
        resume=switches["resume"],
        resume_adapter_file=Path(values["resume_adapter_file"]) if "resume_adapter_file" in values else None,
        sample_prompts=tuple(values.get("sample_prompt", ())),
        reading=reading_from(values),
        **_given(values),
    )
    system_given = values.get("system_prompt") is not None or bool(values.get("no_system_prompt"))
    trains = switches["train"] or switches["resume"]
    return Request(job, trains, switches["test"], "adapter_path" in values, system_given)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the job itself that have defaults there."""
    given = {name: values[name] for name in JOB_DEFAULTS if name in values}
    return {**given, "cache": None} if values.get("no_cache") else given


def _resolve(values: dict[str, Any]) -> None:
    """Lists out of text, and what can be said in two ways said in one; in place.

    Raises:
        ConfigError: both ways at once.
    """
    for one, other in (("alpha", "scale"), ("layers", "num_layers")):
        if one in values and other in values:
            raise ConfigError(f"{one} and {other} say the same thing", expected="one of them", found="both")
    for name in LISTS:
        if isinstance(values.get(name), str):
            values[name] = [part.strip() for part in values[name].split(",") if part.strip()]
    for name in ("sample_prompt", "field"):
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    values |= {name: tuple(values[name]) for name in (*LISTS, "sample_prompt") if name in values}
    if (count := values.pop("num_layers", None)) is not None:
        if count != -1 and count < 1:
            raise ConfigError("num_layers out of range", expected="at least 1, or -1 for all", found=count)
        values["layers"] = "all" if count == -1 else f"last-{count}"
    if (ratio := values.pop("loraplus_ratio", None)) is not None:
        values["rate_factors"] = {**values.get("rate_factors", {}), "lora_b": ratio}
    own = values.get("optimizer_config", {})
    if own and set(own) <= set(OPTIMIZERS):  # mlx-lm has the settings of each optimizer by its name
        values["optimizer_config"] = own.get(values.get("optimizer", TrainConfig().optimizer)) or {}
    for name in ("optimizer_config", "rate_factors"):
        if name in values:
            values[name] = {key: _number(value) for key, value in values[name].items()}


def read_settings(file: Path) -> dict[str, Any]:
    """The options in a YAML file; mlx-lm's `lora_parameters` block is read too.

    Raises:
        ConfigError: not readable, not a mapping, unknown keys, with the nearest known one, or values of
            the wrong type.
    """
    import yaml

    if not file.is_file():
        raise ConfigError("no such file", where=file, expected="a YAML file of options")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, first = getattr(error, "problem_mark", None), str(error).splitlines()[0]
        where = file if mark is None else f"{file} line {mark.line + 1}"
        raise ConfigError(f"not YAML: {getattr(error, 'problem', None) or first}", where=where) from error
    if not isinstance(values, dict):
        raise ConfigError("not a mapping of options", where=file, expected="lines such as 'iters: 100'")
    values = {str(name).replace("-", "_"): value for name, value in values.items() if value is not None}
    block = values.pop("lora_parameters", {})
    if not isinstance(block, dict):
        raise ConfigError("lora_parameters is not a mapping", where=file, expected="rank, scale, dropout", found=block)
    values |= {str(name): value for name, value in block.items() if value is not None}
    unknown = [name for name in values if name not in KNOWN]
    if unknown:
        near = {name: difflib.get_close_matches(name, KNOWN, n=1) for name in unknown}
        details = [name + (f": is it {near[name][0]!r}?" if near[name] else "") for name in unknown]
        raise ConfigError("unknown options", where=file, details=details)
    values = {name: _number(value) if TYPES[name] == "float" else value for name, value in values.items()}
    wrong = [name for name, value in values.items() if not _fits(value, TYPES[name])]
    if wrong:
        details = [f"{name}: expected {KINDS[TYPES[name]][1]}, found {values[name]!r}" for name in wrong]
        raise ConfigError("options of the wrong type", where=file, details=details)
    return values


def _number(value: Any) -> Any:
    """Text such as 1e-3 as the number it is everywhere but in YAML 1.1, which wants 1.0e-3."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _fits(value: Any, kind: str) -> bool:
    return isinstance(value, KINDS[kind][0]) and (kind == "bool" or not isinstance(value, bool))
