"""What rounding in 16 bits costs: the error of logits against the float32 model of the same 16-bit weights.

    python benchmarks/bench_norms.py [--seeds 6] [--layers 16,56] [--json FILE]

Each case is a dtype, a number of layers, and quantizers of keys and values on or off. `error_ratio` is the root mean
square error of the model as it is (norms in one kernel, as every MLX model has them: the normalized value is rounded,
then its product with the weight) by that of the same model with norms that round once; `error` and `error_once` are the
two, means over seeds, and `standard_error` is the ratio's.

"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from measured import described
from mlx.utils import tree_flatten

from mlx_afm.model import AFMConfig, Model
from mlx_afm.model.layers import RMSNorm

RESULTS = Path(__file__).resolve().parent / "results" / "norms.json"
SIZES = {"vocab_size": 512, "hidden_dim": 128, "num_heads": 8, "num_kv_heads": 2}
ONE_KERNEL = RMSNorm.__call__


def rounded_once(self: RMSNorm, x: mx.array) -> mx.array:
    """The norm in float32 from end to end."""
    return mx.fast.rms_norm(x.astype(mx.float32), self.weight.astype(mx.float32), self.eps).astype(x.dtype)


def models(seed: int, layers: int, quantizers: bool, dtype: mx.Dtype) -> tuple[Model, Model]:
    """A 16-bit model, and the float32 one of its weights."""
    config = AFMConfig(**SIZES, num_layers=layers, num_kv_reuse_layers=layers * 3 // 8, kv_quant=quantizers)
    rng = np.random.default_rng(seed)
    mx.random.seed(seed)
    one, other = Model(config), Model(config)
    weights = []
    for name, array in tree_flatten(one.parameters()):
        if name.endswith("_scale"):
            weights.append((name, mx.array(rng.uniform(0.012, 0.024), mx.float32)))
            continue
        if name.endswith("norm.weight"):
            array = mx.array(1 + 0.2 * rng.standard_normal(array.shape), mx.float32)
        weights.append((name, array.astype(dtype)))
    one.load_weights(weights)
    other.load_weights([(name, array.astype(mx.float32)) for name, array in weights])
    one.eval(), other.eval()
    return one, other


def errors(seed: int, layers: int, quantizers: bool, dtype: mx.Dtype) -> tuple[float, float]:
    """Root mean square errors of logits: norms in one kernel, and norms that round once."""
    model, exact = models(seed, layers, quantizers, dtype)
    tokens = mx.array(np.random.default_rng(seed).integers(1, SIZES["vocab_size"], (2, 40)))
    wanted = exact(tokens)
    found = []
    for norm in (ONE_KERNEL, rounded_once):
        RMSNorm.__call__ = norm  # type: ignore[method-assign]
        difference = model(tokens).astype(mx.float32) - wanted
        found.append(mx.sqrt(mx.mean(difference * difference)).item())
    RMSNorm.__call__ = ONE_KERNEL  # type: ignore[method-assign]
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--layers", default="16,56")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    cases = {}
    for layers in map(int, args.layers.split(",")):
        for quantizers in (False, True):
            for dtype in (mx.bfloat16, mx.float16):
                found = np.array([errors(seed, layers, quantizers, dtype) for seed in range(args.seeds)])
                ratios = found[:, 0] / found[:, 1]
                kind = str(dtype).removeprefix("mlx.core.")
                name = f"{kind}, {layers} layers, quantizers {'on' if quantizers else 'off'}"
                cases[name] = {
                    "error_ratio": float(ratios.mean()),
                    "standard_error": float(ratios.std(ddof=1) / np.sqrt(len(ratios))),
                    "error": float(found[:, 0].mean()),
                    "error_once": float(found[:, 1].mean()),
                }
                print(name, cases[name], flush=True)
    args.json.write_text(json.dumps({"cases": cases, **described("mlx", "numpy")}, indent=2) + "\n")


if __name__ == "__main__":
    main()
