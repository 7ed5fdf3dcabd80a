"""Adapters out of the library and between their forms."""

from __future__ import annotations

from pathlib import Path

from mlx_afm.adapters import Adapter, read_adapter, write_adapter_folder, write_adapter_package, write_adapter_pt
from mlx_afm.errors import AdapterError, ConfigError
from mlx_afm.formats.fmadapter import SUFFIX, Metadata, require_adapter_name
from mlx_afm.formats.fmadapter_check import check_fmadapter
from mlx_afm.formats.fmadapter_report import Report
from mlx_afm.workflows.load import open_adapter


def export_fmadapter(
    adapter_path: str | Path,
    name: str,
    output_dir: str | Path,
    *,
    model_path: str | Path | None = None,
    **metadata: str,
) -> tuple[Path, Report]:
    """Writes `output_dir`/`name`.fmadapter, then checks it.

    Args:
        adapter_path: any adapter form.
        name: letters, digits and underscores; devices refuse anything else.
        output_dir: made if need be; an existing package of this name is replaced.
        model_path: the base model's folder, if the adapter does not say what it was made for.
        metadata: `author`, `description`, `license`, `signature`.

    Raises:
        ConfigError: a name or metadata that devices refuse.
        AdapterError: an adapter that a package cannot hold exactly.
    """
    require_adapter_name(name)
    adapter = _open(Path(adapter_path), model_path)
    settings = Metadata(name=name, rank=adapter.config.rank, **metadata)  # type: ignore[arg-type]
    target = Path(output_dir) / f"{name}{SUFFIX}"
    write_adapter_package(target, adapter, settings)
    return target, check_fmadapter(target)


def convert_adapter(source: str | Path, target: str | Path, *, model_path: str | Path | None = None) -> Path:
    """Writes an adapter in the form that the target's suffix asks for: `.pt`, `.fmadapter`, or a folder.

    Raises:
        AdapterError: the form cannot hold this adapter exactly. ConfigError: the target is in the way.
    """
    source, target = Path(source), Path(target)
    if target.suffix == ".fmadapter":
        require_adapter_name(target.stem)
    elif target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError("the target exists already", where=target, advice="Remove it or choose another name.")
    adapter = _open(source, model_path)
    if target.suffix == ".fmadapter":
        return write_adapter_package(target, adapter, Metadata(name=target.stem, rank=adapter.config.rank))
    if target.suffix == ".pt":
        write_adapter_pt(target, adapter)
    else:
        write_adapter_folder(target, adapter)
    return target


def _open(path: Path, model_path: str | Path | None) -> Adapter:
    if not path.exists():
        expected = "an adapter folder, a .pt or a .fmadapter"
        raise AdapterError("no such adapter", where=path, expected=expected)
    return read_adapter(path) if model_path is None else open_adapter(Path(model_path), path)
