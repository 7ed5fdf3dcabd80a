"""What bench_generate.py gives to both sides: random weights, adapters by both sides' names, and a draft model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from train_inputs import write_weights

from mlx_afm.adapters import LoRAConfig, adapter_shapes, write_adapter_folder
from mlx_afm.adapters.store import Adapter
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.generation.sampling import log_probabilities
from mlx_afm.model import AFMConfig, Model

SIZES = {
    512: {"hidden_dim": 512, "num_layers": 18, "num_kv_reuse_layers": 6, "vocab_size": 16384},
    1024: {"hidden_dim": 1024, "num_layers": 18, "num_kv_reuse_layers": 6, "vocab_size": 16384},
}
PAIR = {"hidden_dim": 1024, "num_layers": 18, "num_kv_reuse_layers": 6, "vocab_size": 8192}
THETA = 500000.0
RANK, SCALE = 16, 0.5
PARTS = ("q", "k", "v")
# Accepted one after the other with this probability, 70 % of 5 proposals are: the mean of 0.884 ** n, n from 1 to 5.
WANTED_AGREEMENT, TEMPERATURE = 0.884, 1.0
PROBED_TOKENS = 256


def model_spec(width: int, folder: Path) -> dict:
    """Weights that both sides load, and their sizes."""
    spec = write_weights({**SIZES[width], "rope_theta": THETA}, folder)
    return {"config": spec["config"], "weights": spec["weights"]}


def adapters_spec(spec: dict, folder: Path, ranks: Sequence[int] = (RANK, RANK)) -> dict:
    """Adapters on all projections, in our form and by mlx-lm's names."""
    base, ours, theirs = AFMConfig(**spec["config"]), [], []
    for number, rank in enumerate(ranks):
        config = LoRAConfig(rank=rank, scale=SCALE)
        rng = np.random.default_rng(number)
        values = {
            name: (0.05 * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in adapter_shapes(base, config).items()
        }
        path = folder / f"adapter-{number}"
        write_adapter_folder(path, Adapter(config, base, {name: LazyTensor.of(v) for name, v in values.items()}))
        ours.append(str(path))
        theirs.append(str(folder / f"mlx-lm-adapter-{number}.safetensors"))
        mx.save_safetensors(theirs[-1], {mlx_lm_name(name): mx.array(v) for name, v in values.items()})
    return {"adapters": ours, "mlx_lm_adapters": theirs}


def mlx_lm_name(name: str) -> str:
    """`...qkv_proj.q.lora_a` as `...qkv_proj.lora_a.0`; other names are the same."""
    stem, part, array = name.rsplit(".", 2)
    return f"{stem}.{array}.{PARTS.index(part)}" if part in PARTS else name


def pair_spec(folder: Path) -> tuple[dict, float]:
    """A target, and a draft that is its first layer: what the other layers add is made as small as it takes for
    seven of ten proposals to be accepted; and the probability of one that this takes, as it was found.

    Drawn with temperature 1, a proposal is accepted with probability sum(min(p, q)) of the two distributions.
    """
    spec = write_weights({**PAIR, "rope_theta": THETA}, folder)
    target = Model(AFMConfig(**spec["config"]))
    target.load_weights(spec["weights"])
    small = {**spec["config"], "num_layers": 1, "num_kv_reuse_layers": 0}
    draft = Model(AFMConfig(**small))
    held = dict(tree_flatten(target.parameters()))
    draft.load_weights([(name, held[name]) for name, _ in tree_flatten(draft.parameters())])
    tokens = mx.array(np.random.default_rng(0).integers(1, PAIR["vocab_size"], (1, PROBED_TOKENS)))
    proposed = mx.softmax(log_probabilities(draft(tokens)[0]) / TEMPERATURE, axis=-1)
    low, high = 0.0, 2.0
    for _ in range(12):
        factor = (low + high) / 2
        scale_outputs(target, held, factor)
        expected = mx.softmax(log_probabilities(target(tokens)[0]) / TEMPERATURE, axis=-1)
        share = mx.minimum(proposed, expected).sum(axis=-1).mean().item()
        low, high = (low, factor) if share < WANTED_AGREEMENT else (factor, high)
    paths = [str(folder / f"{name}.safetensors") for name in ("target", "draft")]
    for path, model in zip(paths, (target, draft)):
        mx.save_safetensors(path, dict(tree_flatten(model.parameters())))
    return {"config": spec["config"], "weights": paths[0], "draft": [small, paths[1]], "temp": TEMPERATURE}, share


def scale_outputs(target: Model, held: dict[str, mx.array], factor: float) -> None:
    """Gives all layers but the first other output projections: the first ones times a factor."""
    names = [
        name
        for name in held
        if name.endswith(("out_proj.weight", "down_proj.weight")) and not name.startswith("model.layers.0.")
    ]
    target.load_weights([(name, factor * held[name]) for name in names], strict=False)
    mx.eval(target.parameters())


def parameters_of(config: dict) -> int:
    """Parameters of a model of these sizes; nothing is computed."""
    return sum(array.size for _, array in tree_flatten(Model(AFMConfig(**config)).parameters()))
