"""The training loop: what a step sums, what it reports, when it saves, what it refuses."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.optimizers import SGD
from mlx.utils import tree_flatten

from mlx_afm.adapters import LoRAConfig, adapter_weights, add_adapter, train_only
from mlx_afm.data import Tokens, make_batch
from mlx_afm.errors import ConfigError
from mlx_afm.training import (
    Evaluated,
    Hooks,
    Sampled,
    StepsReported,
    TrainConfig,
    TrainingFinished,
    TrainingStarted,
    is_recorded,
    to_record,
    train,
)
from mlx_afm.training.schedule import depends_on_length, learning_rate, warmup_steps
from mlx_afm.training.state import TrainState
from mlx_afm.training.step import batch_loss, evaluate, train_step
from tiny import tiny_model, with_adapter


def examples(count: int, seed: int = 0) -> list[Tokens]:
    """Rows that end in their own first token three times: easy to learn."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        read = rng.integers(1, 61, rng.integers(3, 8)).astype(np.int32)
        ids = np.concatenate([read, np.full(3, read[0], np.int32)])
        weights = np.concatenate([np.zeros(len(read), np.float32), np.ones(3, np.float32)])
        rows.append(Tokens(ids, weights, f"line {index}"))
    return rows


def adapted():
    model = tiny_model()
    add_adapter(model, LoRAConfig(rank=4))
    return model


def test_training_lowers_the_loss_and_tells_what_happens():
    events, saves, model = [], [], adapted()
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters()) if "lora" not in name}
    config = TrainConfig(iters=30, batch_size=4, learning_rate=0.02, steps_per_eval=10, save_every=20)
    state = train(model, examples(40), examples(8, seed=1), config, Hooks(on_event=events.append, save=saves.append))
    losses = [event.loss for event in events if isinstance(event, Evaluated)]
    assert losses[-1] < 0.8 * losses[0]
    assert state.step == 30
    assert state.best_loss == min(losses)
    assert [event.step for event in events if isinstance(event, Evaluated)] == [0, 10, 20, 30]
    assert [event.step for event in events if isinstance(event, StepsReported)] == [10, 20, 30]
    assert isinstance(events[0], TrainingStarted)
    assert isinstance(events[-1], TrainingFinished)
    assert saves.count("last") == 2  # at 20 and at the end
    assert saves.count("best") == sum(event.best for event in events if isinstance(event, Evaluated))
    assert not model.training
    after = dict(tree_flatten(model.parameters()))
    assert all(np.array_equal(array, np.array(after[name])) for name, array in before.items()), "the base moved"
    assert [to_record(event)["event"] for event in events if is_recorded(event)][:2] == ["start", "eval"]


def test_a_report_has_the_numbers_of_its_steps(monkeypatch):
    # A clock that moves on by a second each time it is read, so that a step takes one.
    monkeypatch.setattr("mlx_afm.training.trainer.time", SimpleNamespace(perf_counter=itertools.count().__next__))
    events, data = [], examples(40)
    config = TrainConfig(epochs=1, batch_size=4, steps_per_report=4, learning_rate=0.01, schedule="linear", warmup=0)
    train(adapted(), data, [], config, Hooks(on_event=events.append))
    reports = [event for event in events if isinstance(event, StepsReported)]
    assert [(event.step, event.total_steps, event.epoch) for event in reports] == [(4, 10, 0), (8, 10, 0), (10, 10, 0)]
    assert [event.trained_tokens for event in reports] == [48, 96, 120]  # three of each example
    assert [event.learning_rate for event in reports] == pytest.approx([0.007, 0.003, 0.001])
    assert [event.seconds_left for event in reports] == [6, 2, 0]
    read = sum(event.tokens_per_second * steps for event, steps in zip(reports, (4, 4, 2), strict=True))
    assert read == sum(len(tokens) - 1 for tokens in data)


@pytest.mark.parametrize(("val_batches", "count"), [(-1, 10), (1, 4), (2, 8), (3, 10), (9, 10)])
def test_an_evaluation_covers_the_batches_that_were_asked_for(val_batches, count):
    events, data = [], examples(10, seed=1)
    config = TrainConfig(iters=1, batch_size=4, val_batches=val_batches)
    train(adapted(), examples(4), data, config, Hooks(on_event=events.append))
    before = next(event for event in events if isinstance(event, Evaluated))
    loss, tokens = evaluate(adapted(), [make_batch([example]) for example in data[:count]])
    assert before.tokens == tokens == 3 * count
    assert before.loss == pytest.approx(loss / tokens, rel=1e-5)


def test_epochs_use_every_example_and_the_last_partial_window():
    events = []
    config = TrainConfig(epochs=2, batch_size=4, grad_accumulation_steps=2, steps_per_report=1)
    state = train(adapted(), examples(11), [], config, Hooks(on_event=events.append))
    # 11 examples are 3 batches, 2 windows: 2 steps an epoch.
    assert (state.step, state.epoch, state.cursor) == (4, 2, 0)
    assert state.trained_tokens == 2 * 11 * 3
    assert state.best_loss is None


def test_same_seed_same_adapter():
    runs = []
    for _ in range(2):
        model = adapted()
        train(model, examples(12), [], TrainConfig(iters=4, seed=3))
        runs.append(adapter_weights(model))
    assert all(mx.array_equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_accumulated_steps_weigh_every_target_the_same():
    """Two unequal micro-batches give the gradient of one big batch, whatever the cut."""
    rows = examples(6)
    long = Tokens(np.arange(1, 20, dtype=np.int32), np.ones(19, np.float32), "long")
    results = []
    for cut in ([[*rows, long]], [rows[:1], [*rows[1:], long]]):
        model = with_adapter(tiny_model())
        result = train_step(model, SGD(learning_rate=1.0), [make_batch(part) for part in cut], clip_norm=0)
        results.append((result, adapter_weights(model)))
    (one, first), (two, second) = results
    assert one.tokens == two.tokens == 6 * 3 + 18
    assert one.loss == pytest.approx(two.loss, rel=1e-5)
    assert one.gradient_norm == pytest.approx(two.gradient_norm, rel=1e-4)
    assert max(mx.abs(first[name] - second[name]).max().item() for name in first) < 1e-4


def test_padding_and_batch_mates_change_nothing():
    model, rows = with_adapter(tiny_model()), examples(5)
    together = batch_loss(model, make_batch(rows)).item()
    alone = sum(batch_loss(model, make_batch([row])).item() for row in rows)
    assert together == pytest.approx(alone, rel=1e-5)
    loss, tokens = evaluate(model, [make_batch(rows)])
    assert (loss, tokens) == (pytest.approx(alone, rel=1e-5), 15)


def test_key_and_value_adapters_get_gradients():
    """In mlx-lm's afm7 these are exactly zero: rounding has no gradient there."""
    model = with_adapter(tiny_model())
    _, gradients = nn.value_and_grad(model, batch_loss)(model, make_batch(examples(4)))
    for name, gradient in tree_flatten(gradients):
        assert mx.abs(gradient).max().item() > 0, name


def test_only_chosen_targets_move():
    model = with_adapter(tiny_model())
    train_only(model, ("k", "down"))
    before = {name: np.array(array) for name, array in adapter_weights(model).items()}
    train(model, examples(8), [], TrainConfig(iters=2))
    moved = {
        name for name, array in adapter_weights(model).items() if not np.array_equal(before[name], np.array(array))
    }
    assert moved == {name for name in before if ".k." in name or "down_proj" in name}


def test_clipping_limits_the_step():
    steps = []
    for limit in (0.0, 1e-3):
        model = with_adapter(tiny_model())
        before = adapter_weights(model)
        result = train_step(model, SGD(learning_rate=1.0), [make_batch(examples(4))], clip_norm=limit)
        after = adapter_weights(model)
        steps.append(math.sqrt(sum(((after[name] - before[name]) ** 2).sum().item() for name in before)))
    assert steps[0] == pytest.approx(result.gradient_norm, rel=1e-3)
    assert steps[1] == pytest.approx(1e-3, rel=1e-2)


def test_a_step_without_a_finite_gradient_is_left_out_and_ten_stop_the_run():
    model = with_adapter(tiny_model())
    model.model.output_norm.weight = mx.full((32,), math.inf)
    before = adapter_weights(model)
    events = []
    with pytest.raises(ConfigError, match=r"10 steps in a row .*learning-rate"):
        train(model, examples(1), [], TrainConfig(iters=20, steps_per_report=1), Hooks(on_event=events.append))
    assert all(mx.array_equal(before[name], array) for name, array in adapter_weights(model).items())
    assert events[-1].skipped_steps == 9
    assert to_record(events[-1])["loss"] is None


def test_sixteen_bit_adapters_and_nothing_to_train_are_refused():
    model = with_adapter(tiny_model())
    model.apply(lambda array: array.astype(mx.bfloat16))
    reason = r"must be float32\. In 16 bits an update is smaller than the rounding of what it changes"
    for dtype in (mx.bfloat16, mx.float16):
        model.apply(lambda array, dtype=dtype: array.astype(dtype))
        with pytest.raises(ConfigError, match=rf"{reason}(.|\n)*lora_a: {dtype}"):
            train(model, examples(2), [], TrainConfig(iters=1))
    model.freeze()
    with pytest.raises(ConfigError, match="nothing to train"):
        train(model, examples(2), [], TrainConfig(iters=1))
    with pytest.raises(ConfigError, match="no training examples"):
        train(adapted(), [], [], TrainConfig(iters=1))


def test_a_trainable_head_is_trained():
    """The chunked loss has no gradient for the head; a model that trains it takes the plain one."""
    model = tiny_model()
    _, gradients = nn.value_and_grad(model, batch_loss)(model, make_batch(examples(3)))
    table = dict(tree_flatten(gradients))["model.embedding.weight"]
    assert mx.abs(table[60]).max().item() > 0  # a word that was not read, only scored


def test_schedules():
    config = TrainConfig(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:2] == [0.1, 0.2]
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)
    linear = TrainConfig(learning_rate=1.0, warmup=0, schedule="linear")
    assert [learning_rate(linear, step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    constant = TrainConfig(learning_rate=2.0, warmup=0, schedule="constant")
    assert learning_rate(constant, 3, 4) == 2.0


def test_settings_out_of_range_are_all_named():
    with pytest.raises(ConfigError) as error:
        TrainConfig(batch_size=0, learning_rate=-1.0, warmup=2.5, schedule="steps", iters=0)
    assert all(name in str(error.value) for name in ("batch_size", "learning_rate", "warmup", "schedule", "iters"))


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.25, 2), (0.99, 8), (1, 1), (3, 3), (100, 8)])
def test_warm_up_is_a_share_below_one_and_steps_from_one_on(warmup, steps):
    config = TrainConfig(learning_rate=1.0, warmup=warmup, schedule="constant")
    rates = [learning_rate(config, step, 8) for step in range(8)]
    assert warmup_steps(config, 8) == steps
    assert rates == sorted(rates)
    assert rates[0] == (1 / max(warmup, 1) if warmup >= 1 else 1 / max(steps, 1))
    assert all(rate == 1.0 for rate in rates[steps:])


def test_only_a_constant_rate_without_a_share_ignores_the_length():
    told = {
        (schedule, warmup): depends_on_length(TrainConfig(schedule=schedule, warmup=warmup))
        for schedule in ("cosine", "linear", "constant")
        for warmup in (0, 0.1, 5)
    }
    assert {key for key, depends in told.items() if not depends} == {("constant", 0), ("constant", 5)}


def test_patience_ends_the_run_and_an_evaluation_an_epoch():
    events = []
    config = TrainConfig(epochs=20, batch_size=4, learning_rate=5.0, schedule="constant", warmup=0, steps_per_eval=0,
                         patience=2, steps_per_report=100, clip_grad_norm=0)  # fmt: skip
    state = train(adapted(), examples(10), examples(8, seed=1), config, Hooks(on_event=events.append))
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    assert [event.step for event in evaluations] == [3 * number for number in range(len(evaluations))]
    assert [event.best for event in evaluations[-2:]] == [False, False]
    assert state.stopped_early
    assert state.step == evaluations[-1].step < 60
    assert state.best_step == max(event.step for event in evaluations if event.best)
    assert isinstance(events[-1], TrainingFinished)
    assert events[-1].stopped_early
    assert events[-2].step == state.step, "the steps since the last report are told"


def test_a_spike_is_told_once_its_window_is_full():
    state = TrainState()
    told = [state.is_spike(loss, 4.0, 10)[0] for loss in (9.0, 1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 1.1, 0.9)]
    assert not any(told)
    assert [state.is_spike(1.0, 4.0, 10)[0] for _ in range(3)] == [False] * 3
    assert state.is_spike(3.0, 4.0, 10) == (True, pytest.approx(0.99))
    assert not state.is_spike(100.0, 0, 10)[0]
    assert state.spikes == 1


def test_samples_do_not_move_the_random_numbers():
    results = []
    for sample in (None, lambda: [("hello", str(mx.random.uniform().item() > 2))]):
        events, model = [], tiny_model()
        add_adapter(model, LoRAConfig(rank=4, dropout=0.3))
        config = TrainConfig(iters=3, steps_per_eval=1)
        train(model, examples(8), examples(3), config, Hooks(on_event=events.append, sample=sample))
        results.append(adapter_weights(model))
    assert all(mx.array_equal(results[0][name], results[1][name]) for name in results[0])
    sampled = [event for event in events if isinstance(event, Sampled)]
    assert [(event.step, event.prompt, event.answer) for event in sampled] == [(s, "hello", "False") for s in range(4)]


def test_it_stops_when_asked_after_the_step_and_saves():
    saves, model = [], adapted()
    hooks = Hooks(save=saves.append, should_stop=lambda: len(saves) > 1)
    state = train(model, examples(20), [], TrainConfig(iters=10, save_every=1), hooks)
    assert (state.step, state.interrupted) == (2, True)
    assert saves == ["last"] * 3
