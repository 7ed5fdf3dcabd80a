"""Loading an oracle folder: our model with its weights, and the reference's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_afm.adapters import add_adapter, read_adapter, set_adapter_weights
from mlx_afm.checkpoints.arrays import to_mlx
from mlx_afm.checkpoints.model_folder import model_tensors
from mlx_afm.checkpoints.names import Entry, plan_adapter
from mlx_afm.checkpoints.toolkit import find_toolkit_files, read_toolkit_checkpoint
from mlx_afm.model import Model, ToolkitConfig


@dataclass
class Oracle:
    folder: Path
    config: ToolkitConfig
    base: Model
    adapted: Model
    outputs: dict[str, np.ndarray]

    @property
    def tokens(self) -> mx.array:
        return mx.array(self.outputs["input_ids"].astype(np.int32))

    @property
    def quantized(self) -> bool:
        return self.config.model.kv_quant

    @property
    def adapter_entries(self) -> list[Entry]:
        return plan_adapter(self.config.model, self.config.adapter)


def load_oracle(folder: Path) -> Oracle:
    checkpoint = read_toolkit_checkpoint(find_toolkit_files(folder))
    models = []
    for _ in range(2):
        model = Model(checkpoint.config.model)
        model.load_weights([(name, to_mlx(tensor)) for name, tensor in model_tensors(checkpoint, None).items()])
        models.append(model)
    base, adapted = models
    adapter = read_adapter(folder / "adapter-final.pt", checkpoint.config.model, checkpoint.config.adapter.scale)
    add_adapter(adapted, adapter.config)
    set_adapter_weights(adapted, {name: to_mlx(t) for name, t in adapter.weights.items()}, where=folder)
    with np.load(folder / "logits.npz") as arrays:
        outputs = {name: arrays[name] for name in arrays.files}
    return Oracle(folder, checkpoint.config, base, adapted, outputs)
