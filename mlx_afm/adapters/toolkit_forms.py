"""Adapters written in the two forms of Apple's toolkit: its `.pt`, and the package that devices load.

Both hold LoRA on every projection of every layer and neither says its scale, so an adapter must have been
brought into that form (`to_device_form`); what still differs is refused, all of it in one error.
"""

from __future__ import annotations

from pathlib import Path

from mlx_afm.adapters.config import DEFAULT_SCALE
from mlx_afm.adapters.layers import ALL, chosen_layers
from mlx_afm.adapters.store import Adapter, adapter_entries
from mlx_afm.checkpoints.names import DEFAULT_ADAPTER, TARGETS
from mlx_afm.errors import AdapterError, ConfigError
from mlx_afm.files import to_path
from mlx_afm.formats.fmadapter import AddFiles, Geometry, Metadata, no_files, write_fmadapter
from mlx_afm.formats.fmadapter_plan import Rounding
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.formats.torch_file import write_torch


def require_lora(adapter: Adapter, what: str) -> None:
    """Checks that an adapter is nothing but low-rank updates.

    Raises:
        AdapterError: it is DoRA or whole weights, with the reason why `what` cannot hold that.
    """
    kind = adapter.config.fine_tune_type
    if kind != "lora":
        weights = "it holds low-rank updates, not weights"
        reasons = {"dora": "magnitudes have no place in it", "full": weights, "qat": weights}
        advice = "Fuse it into a model folder instead (mlx-afm fuse), or train with --fine-tune-type lora."
        raise AdapterError(f"{what} cannot hold this: {reasons[kind]}", expected="lora", found=kind, advice=advice)


def _toolkit_tensors(adapter: Adapter, what: str, name: str, scale: float) -> dict[str, LazyTensor]:
    """The tensors by the toolkit's names with this adapter id, in its order.

    Raises:
        AdapterError: the adapter is not LoRA, has another scale, or leaves projections or layers out, which
            that form cannot say.
    """
    require_lora(adapter, what)
    base, faults = adapter.require_base(), []
    if chosen_layers(adapter.config.layers, base) != chosen_layers(ALL, base):
        faults.append(f"expected every layer, found layers {adapter.config.layers}")
    left_out = [target for target in TARGETS if target not in adapter.config.targets]
    if left_out:
        faults.append(f"expected every projection, found it without {','.join(left_out)}")
    if adapter.config.scale != scale:
        faults.append(f"expected scale {scale:g}, which it implies, found {adapter.config.scale:g}")
    if faults:
        advice = "to_device_form makes it so, as `mlx-afm export` and `mlx-afm adapter convert` do."
        raise AdapterError(f"{what} cannot hold this as it is", advice=advice, details=faults)
    entries = adapter_entries(base, adapter.config, name)
    return {entry.toolkit: adapter.weights[entry.ours] for entry in entries}


def write_adapter_pt(path: str | Path, adapter: Adapter, scale: float = DEFAULT_SCALE) -> None:
    """Writes the toolkit's `.pt`: its names in its order.

    Args:
        path: the file.
        adapter: on every projection of every layer; see `to_device_form`.
        scale: what its reader will apply, since a `.pt` cannot say.

    Raises:
        AdapterError: another scale, or projections or layers left out.
    """
    path = to_path(path)
    write_torch(path, _toolkit_tensors(adapter, "a toolkit .pt", adapter.name, scale))


def package_tensors(adapter: Adapter) -> dict[str, LazyTensor]:
    """The tensors of a package for this adapter, in its order.

    Raises:
        AdapterError: another scale than 0.5, or projections or layers left out.
    """
    return _toolkit_tensors(adapter, "a .fmadapter", DEFAULT_ADAPTER, DEFAULT_SCALE)


def write_adapter_package(
    folder: str | Path,
    adapter: Adapter,
    metadata: Metadata,
    *,
    rounding: Rounding | None = None,
    add_files: AddFiles = no_files,
) -> Path:
    """Writes a `.fmadapter` into a folder; returns where it is.

    Args:
        folder: named after the metadata.
        adapter: on every projection of every layer, with scale 0.5; see `to_device_form`.
        metadata: its rank must be the adapter's.
        rounding, add_files: see `write_fmadapter`.

    Raises:
        AdapterError: another scale than 0.5, projections or layers left out, or values fp16 cannot hold.
        ConfigError: a name devices refuse.
    """
    folder = to_path(folder)
    tensors, base = package_tensors(adapter), adapter.require_base()
    try:
        geometry = Geometry(
            ordinary_layers=base.num_ordinary_layers,
            reuse_layers=base.num_kv_reuse_layers,
            hidden=base.hidden_dim,
            heads=base.num_heads,
            kv_heads=base.num_kv_heads,
            feed_forward=base.feed_forward_dim,
            rank=adapter.config.rank,
        )
    except ConfigError as error:
        raise AdapterError(f"no package can be made: {error}") from error
    return write_fmadapter(folder, tensors, metadata, geometry, rounding=rounding, add_files=add_files)
