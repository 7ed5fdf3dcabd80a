"""The draft pair of a package: `draft.mil` as the toolkit has it, and its weights template with other values.

`draft_weights.bin` is `weights_template.bin`, a blob file (`blob`), in which the payloads that the spec names
(`draft_spec`) were overwritten. Header, metadata blocks, padding, file size, and records that the spec does not name
stay byte for byte. The template must keep every rule of the container.

Source: public descriptions of the toolkit's exporter. None of its three assets is known to us.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_afm.errors import FormatError
from mlx_afm.files import atomic_file
from mlx_afm.formats.blob import map_bytes, read_blobs
from mlx_afm.formats.draft_spec import DraftTensor, require_places, without_units
from mlx_afm.formats.draft_values import encode, payload
from mlx_afm.formats.tensors import LazyTensor

PROGRAM_FILE, WEIGHTS_FILE = "draft.mil", "draft_weights.bin"
_SHOWN = 20


@dataclass(frozen=True)
class DraftPair:
    """Everything the two files are made of.

    Attributes:
        program: the toolkit's `draft.mil`.
        template: the toolkit's `weights_template.bin`.
        spec: what goes where.
        tensors: draft tensors by the spec's names, float32 (or float16).
        surplus: tensors that the spec has no place for; not stored.
    """

    program: Path
    template: Path
    spec: Sequence[DraftTensor]
    tensors: Mapping[str, LazyTensor]
    surplus: tuple[str, ...] = ()

    def checked(self, *, ignore_surplus: bool = False) -> DraftPair:
        """The same pair, once all of it was found to fit together; values are not looked at.

        Args:
            ignore_surplus: leave tensors without a place out, as the toolkit does.

        Raises:
            FormatError: an empty or missing program; a template that breaks a rule; a spec that does not fit it;
                tensors missing, surplus or of another shape, all listed.
        """
        if not len(map_bytes(self.program)):
            raise FormatError("empty", where=self.program, expected="the draft model's program")
        require_places(self.spec, read_blobs(self.template), where=self.template)
        places = {tensor.name for tensor in self.spec}
        surplus = tuple(sorted(set(self.tensors) - places))
        faults = [fault for item in self.spec if (fault := self._tensor_fault(item))]
        faults += [] if ignore_surplus else [f"{name}: the spec has no place for it" for name in surplus]
        if faults:
            raise FormatError(
                "not the tensors of the toolkit's draft model",
                expected=f"{len(places)} tensors",
                found=len(self.tensors),
                advice="Give a whole draft checkpoint of the model that draft-model-config.json describes",
                details=faults[:_SHOWN] + [f"... {len(faults)} faults in all"] * (len(faults) > _SHOWN),
            )
        return replace(self, surplus=surplus)

    def _tensor_fault(self, item: DraftTensor) -> str | None:
        tensor = self.tensors.get(item.name)
        if tensor is None:
            return f"{item.name}: missing"
        if without_units(tensor.shape) != item.shape:
            return f"{item.name}: expected shape {item.shape}, found {tensor.shape}"
        return None if tensor.dtype in ("float32", "float16") else f"{item.name}: dtype {tensor.dtype}"

    def write(self, folder: Path) -> None:
        """Writes both files into a package folder that is being made.

        Raises:
            FormatError: values that a form cannot hold, naming every tensor that has some; see also `checked`.

        Cost: the template and one tensor in memory; time see `kmeans_1d`.
        """
        records = require_places(self.spec, read_blobs(self.template), where=self.template)
        content = np.array(map_bytes(self.template))
        faults = []
        for item in self.spec:
            values = self.tensors[item.name].read_values().astype(np.float32, copy=False).reshape(item.shape)
            try:
                blobs = encode(values, item.format, item.name)
            except FormatError as error:
                faults.append(error)
                continue
            for role, offset in item.offsets.items():
                blob = records[offset]
                content[blob.offset : blob.offset + blob.nbytes] = payload(blobs[role], blob)
        if len(faults) > 1:
            details = [f"{fault.where}: {fault.what}" for fault in faults[:_SHOWN]]
            raise FormatError(f"{len(faults)} draft tensors cannot be stored", details=details)
        if faults:
            raise faults[0]
        with atomic_file(folder / WEIGHTS_FILE) as partial:
            content.tofile(partial)
        shutil.copyfile(self.program, folder / PROGRAM_FILE)
