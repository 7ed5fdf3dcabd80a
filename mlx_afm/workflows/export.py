"""Adapters out of the library and between their forms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_afm.adapters import (
    Adapter,
    DeviceForm,
    FormChange,
    read_adapter,
    to_device_form,
    write_adapter_folder,
    write_adapter_package,
    write_adapter_pt,
)
from mlx_afm.adapters.store import OURS
from mlx_afm.checkpoints.signature import read_signature
from mlx_afm.errors import AdapterError, SettingError
from mlx_afm.files import set_paths, to_optional_path, to_path
from mlx_afm.folders import OnNote, ignore_note, lock_folder, new_folder, require_replaceable
from mlx_afm.formats.fmadapter import (
    PUBLIC_SIGNATURE,
    SUFFIX,
    AddFiles,
    Metadata,
    no_files,
    read_fmadapter,
    require_adapter_name,
)
from mlx_afm.formats.fmadapter_check import check_fmadapter
from mlx_afm.formats.fmadapter_plan import Rounding
from mlx_afm.formats.fmadapter_report import PackageReport
from mlx_afm.model_folder import ModelFolder
from mlx_afm.runs.lineage import base_differs, lineage_of
from mlx_afm.text.system_prompt import SYSTEM_PROMPTS
from mlx_afm.workflows.logit_change import LogitChange, logit_change
from mlx_afm.workflows.reference_answers import PROMPTS, write_reference_answers

PUBLIC_NOTICE = (
    "Signature of toolkit 26.0.0, which OS 26.1 and 26.4 were seen to take: devices whose base model has another "
    "one will refuse it. Ask them: SystemLanguageModel.Adapter.compatibleAdapterIdentifiers(name:). "
    "OS 27 takes no adapters."
)
_PROMPT_NOTICE = (
    "A .pt cannot hold the system prompt that the adapter was trained with: give it with --system-prompt, or with "
    "--no-system-prompt if there was none, when you use this file."
)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A package to be made. Paths may be given as str, with `~`; they are held as `Path`.

    Attributes:
        adapter: any form. The metadata of a package is kept, as far as nothing else is said here.
        name: letters, digits and underscores; devices refuse anything else.
        output_dir: made if need be; an existing package of this name is replaced.
        model: the base model's folder: for adapters that do not say what they were made for, for modules
            that were not trained, and to compare logits.
        toolkit: the toolkit's folder, whose signature is taken.
        author, description, license, signature: None leaves the package's or the default.
        creator_defined: what the app can read at run time; `mlx_afm` is the library's.
        reduce_rank, zero_untrained: see `DeviceForm`.
        compare: with a model, compare the logits of adapter and package.
        reference_answers: with a model, write prompts and greedy answers beside the package.
        prompts: for both.
    """

    adapter: Path
    name: str
    output_dir: Path = Path(".")
    model: Path | None = None
    toolkit: Path | None = None
    author: str | None = None
    description: str | None = None
    license: str | None = None
    signature: str | None = None
    creator_defined: Mapping[str, Any] = field(default_factory=dict)
    reduce_rank: bool = False
    zero_untrained: bool = False
    compare: bool = True
    reference_answers: bool = False
    prompts: tuple[str, ...] = PROMPTS

    def __post_init__(self) -> None:
        set_paths(self, "adapter", "output_dir", "model", "toolkit")
        require_adapter_name(self.name)
        if self.reference_answers and self.model is None:
            raise SettingError("no base model", where="reference_answers", advice="Give it with --model.")
        if OURS in self.creator_defined:
            raise SettingError("creatorDefined: this key is the library's", where=OURS, advice="Choose another name.")


@dataclass(frozen=True)
class Exported:
    """A package, and what became of the adapter on the way.

    Attributes:
        package: the folder.
        metadata: what it says.
        report: of the check.
        form: what was done to rank, scale and modules.
        rounding: what becoming float16 cost.
        logits: how much the model's answers changed; None if that was not asked for.
        reference_answers: the file of prompts and answers, or None.
        base_differs: the adapter was trained on another base model than the one given.
    """

    package: Path
    metadata: Metadata
    report: PackageReport
    form: FormChange
    rounding: Rounding
    logits: LogitChange | None = None
    reference_answers: Path | None = None
    base_differs: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Report and figures as plain JSON values."""
        return {
            **self.report.to_dict(),
            "signature": self.metadata.signature,
            "form": self.form.to_dict(),
            "rounding": self.rounding.to_dict(),
            "logits": None if self.logits is None else self.logits.to_dict(),
            "reference_answers": None if self.reference_answers is None else str(self.reference_answers),
            "base_differs": self.base_differs,
        }

    def notes(self) -> Iterator[str]:
        """What a user should know, a sentence each."""
        yield from self.form.notes()
        errors = f"{self.rounding.max_error:.3g} at most, {self.rounding.mean_error:.3g} in the mean"
        lost = f"; {self.rounding.vanished} values became zero" if self.rounding.vanished else ""
        yield f"rounding to float16: {errors}{lost}"
        if self.logits is not None:
            yield self.logits.note()
        if self.base_differs:
            yield "the adapter says that it was trained on another base model than this one"
        if self.metadata.signature == PUBLIC_SIGNATURE:
            yield PUBLIC_NOTICE


def export_package(config: ExportConfig, add_files: AddFiles = no_files, on_note: OnNote = ignore_note) -> Exported:
    """Makes a package, then checks it.

    Args:
        config: what to make.
        add_files: writes further files of the package into the folder it is given.
        on_note: is given a sentence for each thing that a killed process left and that is removed.

    Raises:
        ConfigError: a name or metadata that devices refuse, or another process that writes this package.
        AdapterError: an adapter that a package cannot hold exactly; see `to_device_form`.
        FormatError: something else in the way, or a toolkit folder without its signature.
    """
    model = None if config.model is None else ModelFolder(config.model)
    target = config.output_dir / f"{config.name}{SUFFIX}"
    with lock_folder(target, on_note=on_note):
        require_replaceable(target, "--output-dir")
        return _export(config, model, add_files)


def _export(config: ExportConfig, model: ModelFolder | None, add_files: AddFiles) -> Exported:
    exported = _write(config, model, add_files)
    if model is None or not exported.report.ok:
        return exported
    target = exported.package
    exported = replace(exported, base_differs=base_differs(config.adapter, model))
    if config.compare:
        adapter = _open(config.adapter, model)
        exported = replace(exported, logits=logit_change(model, adapter, target, config.prompts))
    if config.reference_answers:
        written = write_reference_answers(target, exported.metadata, model.path, config.prompts)
        exported = replace(exported, reference_answers=written)
    return exported


def _write(config: ExportConfig, model: ModelFolder | None, add_files: AddFiles) -> Exported:
    form, rounding = DeviceForm(reduce_rank=config.reduce_rank, zero_untrained=config.zero_untrained), Rounding()
    adapter, change = to_device_form(_open(config.adapter, model), _base_adapter(model), form)
    metadata = _metadata(config, model, adapter)
    target = config.output_dir / metadata.folder_name
    write_adapter_package(target, adapter, metadata, rounding=rounding, add_files=add_files)
    del adapter  # and with it the map of its file: the check maps the package
    report = check_fmadapter(target, signature=metadata.signature, byte_exact=True)
    return Exported(target, metadata, report, change, rounding)


def _metadata(config: ExportConfig, model: ModelFolder | None, adapter: Adapter) -> Metadata:
    source = read_fmadapter(config.adapter)[0] if config.adapter.suffix == SUFFIX else Metadata(name=config.name)
    signature = config.signature
    if signature is None and config.toolkit is not None:
        signature = read_signature(config.toolkit)
    given = {
        "author": config.author,
        "description": config.description,
        "license": config.license,
        "signature": signature,
    }
    creator = {**source.creator_defined, **config.creator_defined}
    ours = creator.get(OURS, {})
    if adapter.system_prompts:
        ours = {**ours, SYSTEM_PROMPTS: list(adapter.system_prompts)}
    creator[OURS] = {**ours, "lineage": {**lineage_of(config.adapter, model), **ours.get("lineage", {})}}
    changed = {name: value for name, value in given.items() if value is not None}
    return replace(source, name=config.name, rank=adapter.config.rank, creator_defined=creator, **changed)  # type: ignore[arg-type]


def export_fmadapter(
    adapter_path: str | Path,
    name: str,
    output_dir: str | Path,
    *,
    model_path: str | Path | None = None,
    **settings: Any,
) -> tuple[Path, PackageReport]:
    """Writes `output_dir`/`name`.fmadapter, then checks it; `export_package` tells more of what it did.

    Args:
        adapter_path: any adapter form.
        name: letters, digits and underscores; devices refuse anything else.
        output_dir: made if need be; an existing package of this name is replaced.
        model_path: the base model's folder; logits are compared only if `compare=True` is given.
        **settings: of `ExportConfig`, such as `author`, `signature`, `reduce_rank`.

    Raises:
        ConfigError, AdapterError, FormatError: see `export_package`.
    """
    model = to_optional_path(model_path)
    settings = {"compare": False, **settings}
    exported = export_package(
        ExportConfig(
            adapter=to_path(adapter_path),
            name=name,
            output_dir=to_path(output_dir),
            model=model,
            **settings,
        )
    )
    return exported.package, exported.report


def convert_adapter(
    source: str | Path,
    target: str | Path,
    *,
    model_path: str | Path | None = None,
    reduce_rank: bool = False,
    zero_untrained: bool = False,
    on_note: OnNote = ignore_note,
) -> Path:
    """Writes an adapter in the form that the target's suffix asks for: `.pt`, `.fmadapter`, or a folder.

    A folder holds any adapter as it is. The other two are brought into the form that their readers take:
    rank 32 and scale 0.5 on all modules, or what the toolkit's JSON of the model says.

    Args:
        source: any form.
        target: must not exist, but for a package, which is replaced.
        model_path: the base model's folder.
        reduce_rank, zero_untrained: see `DeviceForm`.
        on_note: told what was done to the adapter, a sentence at a time.

    Raises:
        AdapterError: the form cannot hold this adapter exactly. ConfigError: the target is in the way.
    """
    source, target = to_path(source), to_path(target)
    model = None if model_path is None else ModelFolder(model_path)
    if target.suffix == SUFFIX:
        config = ExportConfig(
            adapter=source,
            name=target.stem,
            output_dir=target.parent,
            model=None if model is None else model.path,
            reduce_rank=reduce_rank,
            zero_untrained=zero_untrained,
            compare=False,
        )
        exported = export_package(config, on_note=on_note)
        for text in exported.notes():
            on_note(text)
        return exported.package
    with new_folder(target, "name", on_note):
        if target.suffix == ".pt":
            form = replace(toolkit_form(model), reduce_rank=reduce_rank, zero_untrained=zero_untrained)
            _write_pt(source, target, model, form, on_note)
        else:
            write_adapter_folder(target, _open(source, model))
    return target


def _write_pt(source: Path, target: Path, model: ModelFolder | None, form: DeviceForm, on_note: OnNote) -> None:
    adapter = _open(source, model)
    in_form, change = to_device_form(adapter, _base_adapter(model), form)
    write_adapter_pt(target, in_form, form.scale)
    for text in change.notes():
        on_note(text)
    if len(adapter.system_prompts) == 1:
        on_note(_PROMPT_NOTICE)


def toolkit_form(model: ModelFolder | None) -> DeviceForm:
    """Rank and scale that the toolkit's JSON of a model states; without it, the shipped model's."""
    adapter = None if model is None else model.toolkit_config.adapter
    return DeviceForm() if adapter is None else DeviceForm(rank=adapter.rank, scale=adapter.scale)


def _base_adapter(model: ModelFolder | None) -> Adapter | None:
    return None if model is None else model.base_adapter


def _open(path: Path, model: ModelFolder | None) -> Adapter:
    if not path.exists():
        expected = "an adapter folder, a .pt or a .fmadapter"
        raise AdapterError("no such adapter", where=path, expected=expected)
    return read_adapter(path) if model is None else model.open_adapter(path)
