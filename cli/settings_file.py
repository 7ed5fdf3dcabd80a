"""The YAML file of `mlx-afm lora`, `recover` and `estimate`: every key and every value is checked before use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlx_afm.adapters import LoRAConfig
from mlx_afm.errors import ConfigError, SettingError
from mlx_afm.spelling import nearest_name
from mlx_afm.training import TrainConfig

from .data_options import FIELDS as DATA_FIELDS
from .parameters import RENAMED, current_name

LORA_KEYS = {field.name for field in fields(LoRAConfig)} | {"alpha", "use_rslora"}
TRAIN_KEYS = {field.name for field in fields(TrainConfig)}
JOB_KEYS = {"model", "data", "adapter_path", "name", "resume_adapter_file", "project_name", "no_cache", *DATA_FIELDS}
JOB_KEYS |= {"sample_prompt", "sample_tokens", "report_to", "ignore_memory", "no_system_prompt", "frozen_cache"}
DERIVED_KEYS = {"num_layers": "int", "loraplus_ratio": "float"}  # other ways to say layers and rate_factors
SWITCHES = {"train", "test", "resume", "overwrite", "best"}
KNOWN = LORA_KEYS | TRAIN_KEYS | JOB_KEYS | SWITCHES | set(DERIVED_KEYS) | {"lora_parameters"}
# What a file may give for an option, by the type of its field.
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "tuple[str, ...]": "a list of names, or names with commas between",
    "texts": "a text, or a list of texts",
    "Mapping[str, Any]": "a mapping of settings",
    "Mapping[str, float]": "a mapping of names to numbers",
}
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
# Keys of mlx-lm and of other trainers that have another name here, or no meaning: what to write instead.
FIELD_ADVICE = "write field: NAME=COLUMN, such as prompt=question"
FILES_ADVICE = "save the data set as files, and give their folder with data; mlx-afm data convert changes its format"
INSTEAD = {
    "mask_prompt": "leave it out: in conversations and prompt pairs only answers are trained. To train on everything, "
    "write the data as records with the key text",
    "test_batches": "leave it out: test scores the whole test split",
    "keys": "write targets: some of q,k,v,o,gate,up,down",
    "lr_schedule": "write schedule: cosine, linear or constant; warmup: STEPS; learning_rate: PEAK",
    "clear_cache_threshold": "leave it out: nothing has to be set for it here",
    "wandb": "write report_to: wandb, and project_name: NAME",
    "hf_dataset": FILES_ADVICE,
    "prompt_feature": FIELD_ADVICE,
    "completion_feature": FIELD_ADVICE,
    "chat_feature": FIELD_ADVICE,
    "text_feature": FIELD_ADVICE,
    "lora_layers": "write num_layers",
    "lora_rank": "write rank",
    "lora_r": "write rank",
    "lora_alpha": "write alpha",
    "lora_scale": "write scale",
    "lora_dropout": "write dropout",
    "target_modules": "write targets: some of q,k,v,o,gate,up,down",
    "lr": "write learning_rate",
    "max_steps": "write iters",
    "num_epochs": "write epochs",
    "num_train_epochs": "write epochs",
    "gradient_checkpointing": "write grad_checkpoint",
    "gradient_accumulation_steps": "write grad_accumulation_steps",
    "per_device_train_batch_size": "write batch_size",
    "max_length": "write max_seq_length",
    "warmup_steps": "write warmup: STEPS",
    "warmup_ratio": "write warmup: SHARE, below 1",
}


def read_settings(file: Path) -> dict[str, Any]:
    """The options in a YAML file by their names; mlx-lm's `lora_parameters` block is read too.

    Raises:
        ConfigError: not readable. SettingError: not a mapping, a key that is unknown or there twice, or a value of
            the wrong type; all of one kind in one error.
    """
    values = _by_name(_read_mapping(file), file)
    block = values.pop("lora_parameters", {})
    if not isinstance(block, dict):
        raise SettingError("lora_parameters is not a mapping", where=file, expected="rank, scale, dropout", found=block)
    block = _by_name(block, f"{file}, lora_parameters")
    if twice := sorted(values.keys() & block.keys()):
        raise SettingError("keys in lora_parameters and outside it", where=file, expected="one of both", details=twice)
    values |= block
    _accept_mlx_lm(values)
    if unknown := [name for name in values if name not in KNOWN]:
        raise SettingError("unknown options", where=file, details=[describe_unknown(name) for name in unknown])
    values = {name: _normal(value, TYPES[name]) for name, value in values.items()}
    wrong = [name for name, value in values.items() if not _fits(value, TYPES[name])]
    if wrong:
        details = [f"{name}: expected {KINDS[TYPES[name]]}, found {values[name]!r:.80}" for name in wrong]
        raise SettingError("options of the wrong type", where=file, details=details)
    return values


def describe_unknown(name: str) -> str:
    """An unknown key, and what to write instead if that is known."""
    if name in INSTEAD:
        return f"{name}: {INSTEAD[name]}"
    near = nearest_name(name, KNOWN)
    return name if near is None else f"{name}: is it {near!r}?"


def _read_mapping(file: Path) -> dict[Any, Any]:
    import yaml

    if not file.is_file():
        raise ConfigError("no such file", where=file, expected="a YAML file of options")
    try:
        text = file.read_text(encoding="utf-8")
        values, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, first = getattr(error, "problem_mark", None), (str(error) or type(error).__name__).splitlines()[0]
        where = file if mark is None else f"{file} line {mark.line + 1}"
        raise ConfigError(f"not YAML: {getattr(error, 'problem', None) or first}", where=where) from error
    if not isinstance(values, dict):
        raise SettingError("not a mapping of options", where=file, expected="lines such as 'iters: 100'")
    if twice := list(_repeated_keys(root)):
        raise SettingError("a key occurs twice", where=file, expected="each key once", details=twice)
    return values


def _repeated_keys(node: Any) -> Iterator[str]:
    """Keys that a mapping has twice, of which YAML would keep the last without a word."""
    if node.id != "mapping":
        return
    seen: set[str] = set()
    for key, value in node.value:
        name = str(key.value).replace("-", "_")
        if name in seen:
            yield f"line {key.start_mark.line + 1}: {name}"
        seen.add(name)
        if value.id == "mapping":
            yield from _repeated_keys(value)


def _by_name(values: Mapping[Any, Any], where: object) -> dict[str, Any]:
    """The values that are not null, by names with underscores."""
    wrong = [repr(name) for name in values if not isinstance(name, str)]
    if wrong:
        raise SettingError("keys that are no names", where=where, expected="names of options", details=wrong)
    given = {name.replace("-", "_"): value for name, value in values.items() if value is not None}
    if both := [f"{old} and {new}" for old, new in RENAMED.items() if {old, new.replace("-", "_")} <= given.keys()]:
        raise SettingError(
            "an option under its old and its new name", where=where, expected="one of both", details=both
        )
    return {current_name(name).replace("-", "_"): value for name, value in given.items()}


def _accept_mlx_lm(values: dict[str, Any]) -> None:
    """Takes keys of mlx-lm out whose value asks for what happens here in any case; in place."""
    if values.get("mask_prompt") is True:  # only answers are trained
        del values["mask_prompt"]
    if values.get("test_batches") == -1:  # all of the test split
        del values["test_batches"]


def _normal(value: Any, kind: str) -> Any:
    """A value in its type where YAML 1.1 reads it as another: text such as 1e-3 is a number."""
    if kind == "float":
        return _number(value)
    if kind.startswith("Mapping") and isinstance(value, dict):
        return {name: _normal(item, kind if isinstance(item, dict) else "float") for name, item in value.items()}
    return value


def _number(value: Any) -> Any:
    """Text such as 1e-3 as the number it is everywhere but in YAML 1.1, which wants 1.0e-3."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _fits(value: Any, kind: str) -> bool:
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "float":
        return _is_float(value)
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    if kind.startswith("Mapping"):
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            return False
        return kind != "Mapping[str, float]" or all(map(_is_float, value.values()))
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _is_float(value: Any) -> bool:
    """Whether a value is a number that a float can hold; infinity and NaN are left to the range checks."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value)) or isinstance(value, float)
    except OverflowError:
        return False
