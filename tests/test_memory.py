import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mlx_afm.adapters import LoRAConfig
from mlx_afm.memory import Base, Layout, estimate_training, weight_bytes
from mlx_afm.model import AFMConfig
from mlx_afm.quant import Scheme

REAL, SMALL = AFMConfig(), AFMConfig(vocab_size=4096, hidden_dim=128, num_layers=6, num_kv_reuse_layers=2, num_heads=4)
LAYOUT = Layout(rows=2, tokens=128, output_positions=32)
SIDE = Path(__file__).parents[1] / "benchmarks" / "memory_side.py"
STEPS = 35 * 2 * 4  # of the key and value quantizers, float32


def estimate(model=SMALL, base=None, lora=None, layout=LAYOUT, **others):
    return estimate_training(model, base or Base(dtype="float32"), lora or LoRAConfig(), layout, **others)


def test_counts_of_the_real_model_are_exact():
    found = estimate(REAL, Base(dtype="bfloat16"))
    assert found.weights_bytes == 2 * 3_111_368_064 + STEPS
    assert found.adapter_bytes == found.gradients_bytes == 4 * 66_633_728
    assert found.optimizer_bytes == 2 * found.adapter_bytes


def test_codes_are_counted_by_their_scheme():
    dense = weight_bytes(REAL, Base(dtype="bfloat16"))
    codes = weight_bytes(REAL, Base(dtype="bfloat16", schemes={"model.embedding": Scheme(bits=4)}))
    values = REAL.vocab_size * REAL.hidden_dim
    assert dense - codes == values * 2 - (values // 2 + 2 * 2 * values // 64)


@pytest.mark.parametrize(("optimizer", "times"), [("adamw", 2), ("adam", 2), ("sgd", 1), ("muon", 1)])
def test_state_of_an_optimizer(optimizer, times):
    found = estimate(optimizer=optimizer)
    assert found.optimizer_bytes == times * found.adapter_bytes


def test_full_fine_tuning_holds_float32_weights_and_no_adapter():
    found = estimate(base=Base(dtype="bfloat16"), lora=LoRAConfig(fine_tune_type="full"))
    assert found.adapter_bytes == 0
    assert found.weights_bytes == found.gradients_bytes + SMALL.num_ordinary_layers * 8


@pytest.mark.parametrize(("backend", "wide"), [("cpu", 3), ("gpu", 2)])
def test_what_a_plain_layer_keeps_is_counted(backend, wide):
    """Of a uniform stack, from the code: 4 widths; gate and up, on the CPU slopes too; keys rotated, keys, values."""
    uniform = replace(SMALL, num_kv_reuse_layers=0)
    deeper = replace(uniform, num_layers=SMALL.num_layers + 1)
    tokens = LAYOUT.rows * LAYOUT.tokens
    lora = LoRAConfig(rank=4, targets=("q",))
    wanted = 4 * uniform.hidden_dim + wide * uniform.feed_forward_dim + 3 * uniform.kv_dim
    found = [estimate(model, lora=lora, backend=backend).activations_bytes for model in (uniform, deeper)]
    assert found[1] - found[0] == 4 * tokens * wanted


@pytest.mark.parametrize(
    "less",
    [
        {"layout": replace(LAYOUT, rows=1)},
        {"layout": replace(LAYOUT, tokens=96)},
        {"layout": replace(LAYOUT, output_positions=16)},
        {"lora": LoRAConfig(rank=8)},
        {"lora": LoRAConfig(layers="reuse")},
        {"base": Base(dtype="bfloat16")},
        {"grad_checkpoint": True},
        {"optimizer": "sgd"},
        {"model": replace(SMALL, vocab_size=2048)},
        {"model": replace(SMALL, num_layers=5)},
    ],
)
def test_less_takes_less(less):
    smaller, usual = estimate(**less), estimate()
    assert smaller.peak_bytes <= usual.peak_bytes
    assert sum(asdict(smaller).values()) < sum(asdict(usual).values())


def test_summed_gradients_are_held_between_micro_batches():
    once, summed = (estimate(accumulated=accumulated) for accumulated in (False, True))
    assert summed.peak_bytes - once.peak_bytes == once.gradients_bytes


def test_packed_rows_keep_what_plain_ones_do():
    """The keys of each group of queries are brought again in the backward pass; scores are fewer."""
    plain = Layout(rows=1, tokens=512, output_positions=128)
    packed = replace(plain, reach=(8, 64, 176), output_reach=(2, 64, 176))
    assert estimate(layout=packed).activations_bytes == estimate(layout=plain).activations_bytes
    assert math.prod(packed.reach) == packed.scores[0] < plain.scores[0]


@pytest.mark.parametrize(
    "setting",
    [
        {"lora": {"rank": 8}},
        {"lora": {"rank": 8}, "grad_checkpoint": True, "optimizer": "sgd"},
    ],
)
def test_the_peak_is_within_15_percent_of_the_measured_one(setting):
    names = ("vocab_size", "hidden_dim", "num_layers", "num_kv_reuse_layers", "num_heads", "num_kv_heads")
    config = {name: getattr(SMALL, name) for name in names}
    spec = {"config": config, "rows": 2, "tokens": 128, "share": 0.25, **setting}
    done = subprocess.run([sys.executable, SIDE, json.dumps(spec)], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["layout"] == {"rows": 2, "tokens": 128, "output_positions": 32}
    others = {name: setting[name] for name in ("grad_checkpoint", "optimizer") if name in setting}
    found = estimate(lora=LoRAConfig(**setting["lora"]), **others)
    assert found.peak_bytes == pytest.approx(measured["mlx_peak_bytes"], rel=0.15)
