"""A resumed run is the uninterrupted one to the last bit: weights, events, whatever is trained however."""

from __future__ import annotations

from dataclasses import asdict, replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from test_trainer import examples

from mlx_afm.adapters import LoRAConfig, add_adapter
from mlx_afm.errors import FormatError, TensorsError
from mlx_afm.training import Hooks, Snapshot, TrainConfig, TrainingResumed, is_recorded, snapshot_from, to_record, train
from tiny import tiny_model

CONFIG = TrainConfig(
    epochs=3, batch_size=2, grad_accumulation_steps=2, learning_rate=0.02, steps_per_eval=3, save_every=2, seed=5,
    steps_per_report=4,
)  # fmt: skip
TIMES = ("seconds", "seconds_left", "tokens_per_second", "peak_memory_bytes")


def model_with(**form):
    model = tiny_model()
    add_adapter(model, LoRAConfig(rank=4, dropout=0.2, **form), seed=2)
    return model


def run(model, config, *, resume=None, stop_at=None):
    """Trained weights, records without times, and the snapshots by step."""
    records, snapshots = [], {}

    def keep(snapshot: Snapshot) -> None:
        copies = {name: mx.array(array) for name, array in snapshot.weights.items()}
        snapshots[snapshot.state.step] = (replace(snapshot, weights=copies), len(records))

    def on_event(event):
        if is_recorded(event):
            records.append({key: value for key, value in to_record(event).items() if key not in TIMES})

    hooks = Hooks(on_event=on_event, save_state=keep, should_stop=lambda: max(snapshots, default=0) == stop_at)
    train(model, examples(15), examples(4, seed=1), config, hooks, resume=resume)
    return dict(tree_flatten(model.trainable_parameters())), records, snapshots


def same(first, second):
    return set(first) == set(second) and all(mx.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adam"},
        {"optimizer": "sgd", "optimizer_config": {"momentum": 0.9}},
        {"optimizer": "muon"},
        {"optimizer": "adafactor"},
        {"rate_factors": {"lora_b": 4.0}, "schedule": "linear", "no_decay": ("lora_a",)},
        {"grad_checkpoint": True},
        {"batch_tokens": 24, "iters": 12},
    ],
    ids=["adamw", "adam", "sgd", "muon", "adafactor", "groups", "checkpointing", "packed"],
)
def test_from_every_snapshot(changes):
    config = replace(CONFIG, **{"weight_decay": None, **changes})
    whole, records, snapshots = run(model_with(), config)
    assert sorted(snapshots) == [0, 2, 4, 6, 8, 10, 12]
    for step in (0, 4, 12) if changes else snapshots:
        snapshot, told = snapshots[step]
        mx.random.seed(99)
        again, later, _ = run(model_with(), config, resume=snapshot)
        assert same(whole, again), step
        assert records[:told] + later == records, step


def test_dropout_is_in_play():
    """Else the test above would not see a lost random state."""
    whole, _, snapshots = run(model_with(), CONFIG)
    snapshot, _ = snapshots[4]
    other, _, _ = run(model_with(), CONFIG, resume=replace(snapshot, random=7))
    assert not same(whole, other)


def test_interrupted_between_saves():
    config = replace(CONFIG, save_every=100)
    whole, records, _ = run(model_with(), config)
    asked = []
    kept = []
    hooks = Hooks(save_state=kept.append, should_stop=lambda: asked.append(1) or len(asked) == 6)
    state = train(model_with(), examples(15), examples(4, seed=1), config, hooks)
    assert (state.step, state.interrupted) == (5, True)
    again, later, _ = run(model_with(), config, resume=kept[-1])
    assert same(whole, again)
    assert later == records[-len(later) :]
    assert "start" not in [record["event"] for record in later]


def test_a_finished_run_only_says_so_again():
    whole, _, snapshots = run(model_with(), CONFIG)
    told = []
    snapshot, _ = snapshots[12]
    model = model_with()
    train(model, examples(15), examples(4, seed=1), CONFIG, Hooks(on_event=told.append), resume=snapshot)
    assert same(whole, dict(tree_flatten(model.trainable_parameters())))
    assert [type(event).__name__ for event in told] == ["TrainingResumed", "TrainingFinished"]
    assert told[0] == TrainingResumed(step=12, total_steps=12, best_loss=snapshot.state.best_loss)


def test_values_survive_being_text():
    _, _, snapshots = run(model_with(), CONFIG)
    snapshot, _ = snapshots[6]
    import json

    values = json.loads(json.dumps(snapshot.values()))
    again = snapshot_from(values, snapshot.weights, snapshot.optimizer, where="test")
    assert again.random == snapshot.random
    assert asdict(again.state) == asdict(snapshot.state)
    for damaged in ({}, [], {**values, "random": -1}, {**values, "state": {"step": 3}}, {**values, "state": 5}):
        with pytest.raises(FormatError, match="test: not the state of a run"):
            snapshot_from(damaged, {}, {}, where="test")


def test_a_snapshot_of_another_adapter_is_refused():
    _, _, snapshots = run(model_with(), CONFIG)
    with pytest.raises(TensorsError, match=r"the state to resume from(.|\n)*surplus"):
        run(model_with(), replace(CONFIG, optimizer="sgd", weight_decay=None), resume=snapshots[2][0])
    with pytest.raises(TensorsError, match=r"missing|surplus"):
        run(model_with(targets=("q",)), CONFIG, resume=snapshots[2][0])
