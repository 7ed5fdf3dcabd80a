"""Adapter packages as Apple's runtime loads them: `NAME.fmadapter`, a flat folder.

    metadata.json         see `fmadapter_metadata`
    adapter_weights.bin   fp16 records in blob storage v2 (`blob`), in the order of `fmadapter_plan`
    draft.mil, draft_weights.bin   an optional pair for speculative decoding; not written, passed over on reading

There is one version of the form. At rank 32 and Apple's sizes the weights are 133,312,320 bytes. A package for
another model, say a small one for tests, has the same form and states its sizes in the metadata; no device takes it.

Source: public descriptions of the toolkit's exporter; files compared byte for byte with coremltools' writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import AdapterError, ConfigError, FormatError, TensorsError
from mlx_afm.files import atomic_folder, write_text
from mlx_afm.formats.blob import FP16, Blob, read_blobs, write_blobs
from mlx_afm.formats.fmadapter_metadata import PUBLIC_SIGNATURE, SUFFIX, Metadata, read_metadata, require_adapter_name
from mlx_afm.formats.fmadapter_plan import (
    APPLE_GEOMETRY,
    Geometry,
    Record,
    Rounding,
    loaded_values,
    plan_records,
    stored_values,
    tensor_fault,
)
from mlx_afm.formats.tensors import LazyTensor

__all__ = [
    "APPLE_GEOMETRY",
    "PUBLIC_SIGNATURE",
    "SUFFIX",
    "AddFiles",
    "Geometry",
    "Metadata",
    "Record",
    "Rounding",
    "loaded_values",
    "no_files",
    "plan_records",
    "read_fmadapter",
    "require_adapter_name",
    "stored_values",
    "write_fmadapter",
]

METADATA_FILE = "metadata.json"
WEIGHTS_FILE = "adapter_weights.bin"
SHOWN_FAULTS = 20

Tensors = Mapping[str, LazyTensor | npt.NDArray[Any]]
AddFiles = Callable[[Path], None]


def no_files(folder: Path) -> None:
    """Adds nothing to a package."""


def write_fmadapter(
    folder: Path,
    tensors: Tensors,
    metadata: Metadata,
    geometry: Geometry = APPLE_GEOMETRY,
    *,
    rounding: Rounding | None = None,
    add_files: AddFiles = no_files,
) -> Path:
    """Writes a package at `folder` and returns it; a package that is there is replaced once all is written.

    Args:
        folder: `.../NAME.fmadapter`, with the name of the metadata.
        tensors: the checkpoint's adapter tensors by checkpoint name: (in, r) and (r, out), float32.
        metadata: its rank must be the geometry's.
        geometry: sizes of the model the adapter is for.
        rounding: told what becoming fp16 costs.
        add_files: writes further files of the package (the draft pair) into the folder it is given, before the
            package appears; what it raises leaves everything as it was.

    Raises:
        ConfigError: folder name or rank do not belong to the metadata and geometry.
        TensorsError: missing, surplus or misshaped tensors, all of them.
        AdapterError: values that fp16 cannot hold, naming every such tensor; nothing is written.
        FormatError: something that is no package lies at `folder`.

    Cost: one tensor in memory at a time.
    """
    _require_place(folder, metadata, geometry)
    records = plan_records(geometry)
    _require_tensors(tensors, records)
    with atomic_folder(folder) as partial_folder:
        write_text(partial_folder / METADATA_FILE, metadata.text(geometry))
        write_blobs(partial_folder / WEIGHTS_FILE, _all_stored(tensors, records, rounding))
        add_files(partial_folder)
    return folder


def _all_stored(tensors: Tensors, records: list[Record], rounding: Rounding | None) -> Iterator[npt.NDArray[Any]]:
    """The stored form of each tensor in turn; the first that has none ends it with all that have none."""
    for index, record in enumerate(records):
        try:
            yield stored_values(tensors[record.name], record, rounding)
        except AdapterError as error:
            others = (fault for later in records[index + 1 :] if (fault := _value_fault(tensors[later.name], later)))
            faults = [error, *others]
            if len(faults) == 1:
                raise
            details = [f"{fault.where}: {fault.what}" for fault in faults]
            details = details[:SHOWN_FAULTS] + [f"... {len(faults)} tensors in all"] * (len(faults) > SHOWN_FAULTS)
            raise AdapterError("values that fp16 cannot hold", advice=error.advice, details=details) from None


def _value_fault(tensor: LazyTensor | npt.NDArray[Any], record: Record) -> AdapterError | None:
    try:
        stored_values(tensor, record)
    except AdapterError as error:
        return error
    return None


def _require_place(folder: Path, metadata: Metadata, geometry: Geometry) -> None:
    if folder.name != metadata.folder_name:
        raise ConfigError("wrong package name", where=folder, expected=metadata.folder_name, found=folder.name)
    if metadata.rank != geometry.rank:
        raise ConfigError("rank of metadata and geometry differ", expected=geometry.rank, found=metadata.rank)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FormatError("in the way: not a folder", where=folder, advice="Move it or choose another output folder")


def _require_tensors(tensors: Tensors, records: list[Record]) -> None:
    known = {record.name for record in records}
    faults = [f"{record.name}: missing" for record in records if record.name not in tensors]
    faults += [f"{name}: surplus" for name in tensors if name not in known]
    present = (record for record in records if record.name in tensors)
    faults += [fault for record in present if (fault := tensor_fault(tensors[record.name], record))]
    if faults:
        raise TensorsError(
            "not the tensors of an adapter for this model",
            expected=f"{len(records)} tensors",
            found=f"{len(tensors)}",
            advice="Give every adapter tensor of the checkpoint, trained or not",
            details=faults,
        )


def read_fmadapter(folder: Path) -> tuple[Metadata, Geometry, dict[str, LazyTensor]]:
    """A package's metadata, its model's sizes, and its tensors as `write_fmadapter` takes them (float16).

    Raises:
        FormatError: not a package, or one that no device would load; `check_fmadapter` tells more.

    Cost: the weights are memory-mapped; values are read when asked for.
    """
    if not folder.is_dir():
        raise FormatError("no such package folder", where=folder)
    metadata, geometry = read_metadata(folder / METADATA_FILE)
    blobs, records = read_blobs(folder / WEIGHTS_FILE), plan_records(geometry)
    faults = [] if len(blobs) == len(records) else [f"expected {len(records)} records, found {len(blobs)}"]
    for index, (blob, record) in enumerate(zip(blobs, records)):
        if (blob.type_code, blob.nbytes) != (FP16, record.nbytes):
            expected = f"expected {record.nbytes} bytes of fp16, found {blob.nbytes} of {blob.dtype}"
            faults.append(f"record {index} ({record.name}): {expected}")
    if faults:
        raise FormatError("not the records of this geometry", where=folder / WEIGHTS_FILE, details=faults[:20])
    return metadata, geometry, {record.name: _lazy(blob, record) for blob, record in zip(blobs, records)}


def _lazy(blob: Blob, record: Record) -> LazyTensor:
    return LazyTensor("float16", record.shape, partial(_load, blob, record))


def _load(blob: Blob, record: Record) -> npt.NDArray[np.float16]:
    return loaded_values(blob.read(), record)
