"""Settings of a training run: each value out of range is refused by name, and the last allowed value is not."""

import math

import pytest

from mlx_afm.errors import SettingError
from mlx_afm.training import TrainConfig

OUT_OF_RANGE = [
    *[(name, 0) for name in ("batch_size", "batch_tokens", "grad_accumulation_steps", "epochs", "iters")],
    *[(name, 0) for name in ("steps_per_report", "save_every", "max_skipped_steps", "spike_window", "val_batches")],
    *[(name, -1) for name in ("steps_per_eval", "patience", "weight_decay", "clip_grad_norm", "spike_sigmas", "seed")],
    *[("learning_rate", value) for value in (0, math.inf, math.nan)],
    *[("warmup", value) for value in (-0.1, 1.5, math.inf)],
    *[("rank_timeout_seconds", value) for value in (0, 86401)],
    *[("val_batches", -2), ("seed", 1 << 63), ("clip_grad_norm", math.inf), ("schedule", "steps")],
    *[("rate_factors", {"lora_b": 0.0}), ("rate_factors", {"lora_b": math.inf})],
    *[("optimizer_config", {"eps": value}) for value in (True, "1e-8", math.nan)],
    *[("optimizer_config", {"betas": value}) for value in (0.9, (0.9,), (0.9, "1"), (0.9, math.inf))],
    ("optimizer_config", {"bias_correction": 1}),
]

ALLOWED = [
    *[(name, 1) for name in ("batch_size", "batch_tokens", "grad_accumulation_steps", "epochs", "iters")],
    *[(name, 1) for name in ("steps_per_report", "save_every", "max_skipped_steps", "spike_window", "val_batches")],
    *[(name, 0) for name in ("steps_per_eval", "patience", "weight_decay", "clip_grad_norm", "spike_sigmas", "seed")],
    *[("learning_rate", 1e-30), ("warmup", 0), ("warmup", 0.99), ("warmup", 1), ("warmup", 3.0)],
    *[("rank_timeout_seconds", 0.1), ("rank_timeout_seconds", 86400), ("val_batches", -1), ("seed", (1 << 63) - 1)],
    *[("optimizer_config", {"eps": 1e-6, "betas": (0.9, 0.99), "bias_correction": True})],
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=str)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(SettingError) as error:
        TrainConfig(**{name: value})
    assert [fault.split(":")[0] for fault in error.value.details] == [name]


@pytest.mark.parametrize(("name", "value"), ALLOWED, ids=str)
def test_the_last_allowed_value_is_taken(name, value):
    assert getattr(TrainConfig(**{name: value}), name) == value


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "adafactor"])
def test_adam_alone_has_no_decay(optimizer):
    assert TrainConfig(optimizer=optimizer, weight_decay=0.1).decay == 0.1
    with pytest.raises(SettingError, match="Adam has none"):
        TrainConfig(optimizer="adam", weight_decay=0.1)
