"""Small models with random weights, for tests that need no trained one."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_afm.adapters import Adapter, LoRAConfig, adapter_shapes, adapter_weights, add_adapter, set_adapter_weights
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.model import AFMConfig, Model

SIZES = {
    "vocab_size": 61,
    "hidden_dim": 32,
    "num_layers": 5,
    "num_kv_reuse_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
}


def tiny_config(**sizes) -> AFMConfig:
    return AFMConfig(**{**SIZES, **sizes})


def tiny_model(seed: int = 0, **sizes) -> Model:
    """Random weights; norms away from one, quantizer steps fine enough to matter but not to dominate."""
    mx.random.seed(seed)
    model = Model(tiny_config(**sizes))
    rng = np.random.default_rng(seed)
    changed = []
    for name, array in tree_flatten(model.parameters()):
        if name.endswith("norm.weight"):
            changed.append((name, mx.array(1 + 0.2 * rng.standard_normal(array.shape), mx.float32)))
        elif name.endswith("_scale"):
            changed.append((name, mx.array(rng.uniform(0.012, 0.024), mx.float32)))
    model.load_weights(changed, strict=False)
    mx.eval(model.parameters())
    return model


def with_adapter(model: Model, config: LoRAConfig | None = None, seed: int = 1) -> Model:
    """Puts an adapter with B other than zero on a model."""
    add_adapter(model, config or LoRAConfig(rank=4), seed=seed)
    rng = np.random.default_rng(seed)
    weights = {
        name: array if name.endswith("lora_a") else mx.array(0.2 * rng.standard_normal(array.shape), mx.float32)
        for name, array in adapter_weights(model).items()
    }
    set_adapter_weights(model, weights, where="test")
    return model


def random_tokens(shape: tuple[int, ...], seed: int = 0, vocab: int = 61) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(1, vocab, shape).astype(np.int32))


def random_adapter(base, config=None, seed=3):
    """An adapter that changes the model, with values that every form holds exactly (fp16 has the fewest)."""
    config, rng = config or LoRAConfig(), np.random.default_rng(seed)
    shapes = adapter_shapes(base, config)
    values = {name: (0.2 * rng.standard_normal(shape)).astype(np.float16) for name, shape in shapes.items()}
    return Adapter(config, base, {name: LazyTensor.of(array.astype(np.float32)) for name, array in values.items()})
