"""Runs that are left and taken up again: the folder as a whole, at every place where a process may die."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import mlx_afm
from mlx_afm import LoRAConfig, LoRAJob, TrainConfig
from mlx_afm.adapters import read_adapter
from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.files import read_json
from mlx_afm.formats.safetensors_file import read_safetensors
from mlx_afm.runs import folder as run_folder
from mlx_afm.runs.state import STATE, read_state
from mlx_afm.training import Notice, TrainingFinished, TrainingInterrupted, TrainingResumed

CONFIG = TrainConfig(
    iters=9, batch_size=3, learning_rate=3e-3, steps_per_eval=3, save_every=2, steps_per_report=2, seed=4,
    schedule="constant", warmup=2,
)  # fmt: skip
FORM = LoRAConfig(rank=4, dropout=0.1, targets=("q", "k", "down"))
TIMES = ("seconds", "seconds_left", "tokens_per_second", "peak_memory_bytes")


class Killed(BaseException):
    """Stands in for a death that no handler sees."""


@pytest.fixture
def job(model_folder, data_folder, tmp_path):
    return LoRAJob(model=model_folder, data=data_folder, adapter_path=tmp_path / "run", train=CONFIG, lora=FORM)


@pytest.fixture(scope="module")
def whole(model_folder, data_folder, tmp_path_factory):
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    mlx_afm.train(LoRAJob(model=model_folder, data=data_folder, adapter_path=folder, train=CONFIG, lora=FORM))
    return folder


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def require_equal(folder, other):
    for part in ("adapters.safetensors", "best/adapters.safetensors", "adapter_config.json"):
        assert (folder / part).read_bytes() == (other / part).read_bytes(), part
    assert records(folder) == records(other)
    first, second = read_state(folder / STATE), read_state(other / STATE)
    for kind in ("weights", "optimizer"):
        ours, theirs = getattr(first.snapshot, kind), getattr(second.snapshot, kind)
        assert all(np.array_equal(np.array(ours[name]), np.array(theirs[name])) for name in ours)
    assert not [path for path in folder.rglob("*") if path.name.endswith(".part")]


def test_stopped_and_resumed_again_and_again(job, whole):
    events, resumed = [], replace(job, resume=True)
    for _ in range(20):
        asked = []
        result = mlx_afm.train(resumed, events.append, lambda asked=asked: asked.append(1) or len(asked) == 3)
        if not result.interrupted:
            break
    assert result.steps == 9
    require_equal(job.adapter_path, whole)
    assert [event.step for event in events if isinstance(event, TrainingInterrupted)] == [2, 4, 6, 8]
    assert [event.step for event in events if isinstance(event, TrainingResumed)] == [2, 4, 6, 8]
    assert [event.text for event in events if isinstance(event, Notice)] == [
        f"nothing to resume in {job.adapter_path}: starting anew"
    ]


WRITES = {"state": "write_state", "weights": "write_adapter_weights", "settings": "write_json"}


@pytest.fixture(scope="module")
def short(model_folder, data_folder, tmp_path_factory):
    """A run of three steps that nothing interrupts, as a job."""
    config = replace(CONFIG, iters=3, save_every=1, steps_per_eval=2)
    folder = tmp_path_factory.mktemp("short") / "run"
    job = LoRAJob(model=model_folder, data=data_folder, adapter_path=folder, train=config, lora=FORM)
    mlx_afm.train(job)
    return job


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["before", "after"])
@pytest.mark.parametrize("what", WRITES)
def test_killed_around_every_write(short, tmp_path, monkeypatch, what, after):
    """Each write of a kind is the last thing that happens in one of the sittings."""
    job, whole = replace(short, adapter_path=tmp_path / "run"), short.adapter_path
    plain, resumed = getattr(run_folder, WRITES[what]), replace(job, resume=True)
    for number in range(30):
        calls = []

        def dying(*arguments, number=number, calls=calls):
            calls.append(1)
            if len(calls) > number and not after:
                raise Killed
            plain(*arguments)
            if len(calls) > number:
                raise Killed

        shutil.rmtree(job.adapter_path, ignore_errors=True)
        monkeypatch.setattr(run_folder, WRITES[what], dying)
        try:
            mlx_afm.train(job)
            break
        except Killed:
            monkeypatch.setattr(run_folder, WRITES[what], plain)
            mlx_afm.train(resumed)
            require_equal(job.adapter_path, whole)
    assert number >= 2


def test_killed_while_starting_anew_over_an_older_run(job, whole, monkeypatch):
    """The older run's files are never taken for the new one's."""
    shutil.copytree(whole, job.adapter_path)
    (job.adapter_path / "best" / ".adapters.safetensors.abcdefgh.part").write_bytes(b"half")
    (job.adapter_path / f".{STATE}.abcdefgh.part").write_bytes(b"half")
    new = replace(job, train=replace(CONFIG, seed=5), overwrite=True)

    def dying(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "record", dying)
        with pytest.raises(Killed):
            mlx_afm.train(new)
    assert not (job.adapter_path / "best").exists()
    mlx_afm.train(replace(new, resume=True, overwrite=False))
    fresh = replace(new, adapter_path=job.adapter_path.parent / "fresh")
    mlx_afm.train(fresh)
    require_equal(job.adapter_path, fresh.adapter_path)


def test_a_finished_run_has_nothing_left_to_do(job, whole):
    shutil.copytree(whole, job.adapter_path)
    (job.adapter_path / "adapters.safetensors").unlink()  # as if killed between the last two writes
    events = []
    result = mlx_afm.train(replace(job, resume=True), events.append)
    assert (result.steps, result.interrupted) == (9, False)
    assert [event.text for event in events if isinstance(event, Notice)] == [
        f"nothing left to do: the run in {job.adapter_path} is finished (step 9)"
    ]
    assert isinstance(events[-1], TrainingFinished)
    require_equal(job.adapter_path, whole)


def test_more_steps_under_a_constant_rate(job, whole):
    shutil.copytree(whole, job.adapter_path)
    longer = replace(CONFIG, iters=12)
    mlx_afm.train(replace(job, resume=True, train=longer))
    straight = replace(job, adapter_path=job.adapter_path.parent / "straight", train=longer)
    mlx_afm.train(straight)
    for part in ("adapters.safetensors", "best/adapters.safetensors"):
        assert (job.adapter_path / part).read_bytes() == (straight.adapter_path / part).read_bytes()
    assert [record["event"] for record in records(job.adapter_path)].count("end") == 1


def test_what_must_not_differ_is_named(job, whole, copy_of, model_folder, data_folder, tmp_path):
    shutil.copytree(whole, job.adapter_path)
    data = copy_of(data_folder, "other data")
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join(lines[1:]) + "\n")
    model = copy_of(model_folder, "other model")
    weights = model / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(raw)
    changed = replace(
        job, resume=True, model=model, data=data, lora=replace(FORM, rank=8),
        train=replace(CONFIG, learning_rate=1e-4, save_every=5, iters=7), resume_adapter_file=None,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="cannot resume this run with other settings") as error:
        mlx_afm.train(changed)
    text = str(error.value)
    assert "learning_rate: the run has 0.003, asked for 0.0001" in text
    assert "rank: the run has 4, asked for 8" in text
    assert "train data: the run has " in text
    assert "base model: the run has " in text
    assert "steps: the run has 9, asked for 7; 9 are done" in text
    assert "save_every" not in text
    assert "valid data" not in text


def test_a_schedule_that_knows_its_length_cannot_grow(job):
    cosine = replace(job, train=replace(CONFIG, schedule="cosine", iters=2))
    mlx_afm.train(cosine)
    with pytest.raises(ConfigError, match=r"steps: the run has 2, asked for 4; with a cosine schedule"):
        mlx_afm.train(replace(cosine, resume=True, train=replace(cosine.train, iters=4)))
    share = replace(job, train=replace(CONFIG, warmup=0.5, iters=2), overwrite=True)
    mlx_afm.train(share)
    with pytest.raises(ConfigError, match="warm-up as a share"):
        mlx_afm.train(replace(share, resume=True, overwrite=False, train=replace(share.train, iters=4)))


def test_an_unfinished_run_that_is_replaced_is_said_to_be(job):
    asked = []
    mlx_afm.train(job, should_stop=lambda: asked.append(1) or len(asked) == 4)
    events = []
    mlx_afm.train(replace(job, train=replace(CONFIG, iters=1)), events.append)
    (notice,) = [event.text for event in events if isinstance(event, Notice)]
    assert notice.startswith(f"starting anew: the unfinished run in {job.adapter_path} (step 3 of 9) is replaced")
    events.clear()
    mlx_afm.train(replace(job, train=replace(CONFIG, iters=1), overwrite=True), events.append)
    assert [event.text for event in events if isinstance(event, Notice)] == [
        f"starting anew: a finished run of 1 steps in {job.adapter_path} is replaced"
    ]


def test_an_adapter_without_its_run_is_not_resumed(job, whole):
    shutil.copytree(whole, job.adapter_path)
    (job.adapter_path / STATE).unlink()
    with pytest.raises(ConfigError, match=r"not the state of its run .*--resume-adapter-file"):
        mlx_afm.train(replace(job, resume=True))


def test_a_damaged_state_is_one_clear_error(job, whole):
    shutil.copytree(whole, job.adapter_path)
    path, raw = job.adapter_path / STATE, (whole / STATE).read_bytes()
    rng = np.random.default_rng(0)
    header = int.from_bytes(raw[:8], "little") + 8
    cuts = [0, 5, 8, 100, header, len(raw) - 1]
    damages = [raw[:cut] for cut in cuts] + [raw + b"x" * 9]
    for place in (*rng.integers(0, header, 40), *rng.integers(header, len(raw), 20)):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << int(rng.integers(8))
        damages.append(bytes(flipped))
    refused = 0
    for damage in damages:
        path.write_bytes(damage)
        try:
            read_state(path)
        except FormatError as error:
            refused += str(path) in str(error)
    assert refused >= len(damages) - 3, "a space of the padding, or bytes after the end, may change without harm"
    path.write_bytes(raw[:1000])
    with pytest.raises(FormatError):
        mlx_afm.train(replace(job, resume=True))
    events = []
    with pytest.raises(ConfigError, match="an adapter without a readable state of its run"):
        mlx_afm.train(replace(job, train=replace(CONFIG, iters=1)))
    mlx_afm.train(replace(job, train=replace(CONFIG, iters=1), overwrite=True), events.append)
    assert any(isinstance(event, Notice) and "cannot be read" in event.text for event in events)


def test_the_state_is_three_times_the_adapter(whole):
    trained = sum(tensor.nbytes for tensor in read_safetensors(whole / "adapters.safetensors").values())
    assert 3 * trained < (whole / STATE).stat().st_size < 3 * trained + 40_000


def test_patience_may_be_added(job, whole):
    shutil.copytree(whole, job.adapter_path)
    events = []
    mlx_afm.train(replace(job, resume=True, train=replace(CONFIG, patience=50)), events.append)
    assert read_adapter(job.adapter_path).config.rank == 4
    assert read_json(job.adapter_path / "adapter_config.json")["train"]["patience"] == 50
