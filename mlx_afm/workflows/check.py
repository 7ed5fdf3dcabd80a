"""Check a package, on request against the adapter it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_afm.adapters import DeviceForm, package_tensors, read_adapter, to_device_form
from mlx_afm.errors import AdapterError, FormatError
from mlx_afm.files import set_paths
from mlx_afm.formats.fmadapter import APPLE_GEOMETRY, METADATA_FILE
from mlx_afm.formats.fmadapter_check import check_fmadapter
from mlx_afm.formats.fmadapter_metadata import read_metadata
from mlx_afm.formats.fmadapter_report import PackageReport
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.model_folder import ModelFolder


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What to check a package against, beside the rules.

    Attributes:
        package: the folder.
        signature: of the base model wanted, or its first digits.
        expect: an adapter of any form, whose values the package must hold once it is brought into the
            form of a package: scale folded, rank padded, untrained modules filled.
        model: the base model's folder, for an `expect` that needs it.
        toolkit: the toolkit's folder, which the draft files must come from.
        byte_exact: metadata that is not the canonical text fails.
        reduce_rank, zero_untrained: as the package was exported. The decomposition that reduces a rank may
            differ in the last bits from machine to machine.
    """

    package: Path
    signature: str | None = None
    expect: Path | None = None
    model: Path | None = None
    toolkit: Path | None = None
    byte_exact: bool = False
    reduce_rank: bool = False
    zero_untrained: bool = False

    def __post_init__(self) -> None:
        set_paths(self, "package", "expect", "model", "toolkit")


def check_package(config: CheckConfig) -> PackageReport:
    """What `check_fmadapter` finds.

    Raises:
        FormatError: no package there. AdapterError: `expect` cannot be brought into the form of a package.
    """
    if not config.package.exists():
        raise FormatError("no such package", where=config.package, expected="a .fmadapter folder")
    if config.toolkit is not None and not config.toolkit.is_dir():
        raise FormatError("no such folder", where=config.toolkit, expected="the toolkit's folder, or its assets")
    return check_fmadapter(
        config.package,
        expect=None if config.expect is None else _expected(config.expect, config),
        signature=config.signature,
        toolkit=config.toolkit,
        byte_exact=config.byte_exact,
    )


def _expected(path: Path, config: CheckConfig) -> Mapping[str, LazyTensor]:
    if not path.exists():
        raise AdapterError("no such adapter", where=path, expected="an adapter folder, a .pt or a .fmadapter")
    model = None if config.model is None else ModelFolder(config.model)
    adapter = read_adapter(path) if model is None else model.open_adapter(path)
    form = DeviceForm(rank=_rank(config.package), reduce_rank=config.reduce_rank, zero_untrained=config.zero_untrained)
    in_form, _ = to_device_form(adapter, None if model is None else model.base_adapter, form)
    return package_tensors(in_form)


def _rank(package: Path) -> int:
    """The rank that a package is planned with; Apple's if it does not say, which the check then tells."""
    try:
        return read_metadata(package / METADATA_FILE)[1].rank
    except FormatError:
        return APPLE_GEOMETRY.rank
