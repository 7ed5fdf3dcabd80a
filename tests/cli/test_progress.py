"""Progress of what takes long: a line every few seconds where nobody watches, one line rewritten at a terminal."""

import itertools

import pytest

import mlx_afm
from mlx_afm import InitConfig, LoRAConfig, LoRAJob, TrainConfig
from mlx_afm.quant import QuantConfig
from mlx_afm.training import StageProgress


@pytest.fixture
def slow_clock(monkeypatch):
    """Every look at the clock is six seconds after the one before."""
    import mlx_afm_cli.progress as shown

    ticks = itertools.count(step=6.0)
    monkeypatch.setattr(shown.time, "perf_counter", lambda: next(ticks))


def stages(events):
    """The progress of each stage: [(done, total, unit), ...]."""
    found = {}
    for event in events:
        if isinstance(event, StageProgress):
            found.setdefault(event.stage, []).append((event.done, event.total, event.unit))
    return found


def test_validation_and_testing_tell_of_their_batches(model_folder, data_folder, tmp_path):
    events = []
    job = LoRAJob(model=model_folder, data=data_folder, adapter_path=tmp_path / "run", lora=LoRAConfig(rank=4),
                  train=TrainConfig(iters=1, batch_size=2))  # fmt: skip
    mlx_afm.train(job, events.append)
    assert stages(events) == {"validation": [(1, 2, "batches"), (2, 2, "batches")] * 2}
    events.clear()
    mlx_afm.score(model_folder, None, data_folder, batch_size=1, on_event=events.append)
    assert stages(events) == {"scoring": [(done, 4, "batches") for done in (1, 2, 3, 4)]}


@pytest.mark.parametrize("quantized", [False, True])
def test_fusing_tells_of_its_bytes(model_folder, adapter_forms, tmp_path, quantized):
    events, source = [], model_folder
    if quantized:
        config = QuantConfig(bits=4, group_size=32)
        source = mlx_afm.convert(model_folder, tmp_path / "q", quantization=config).folder
    mlx_afm.fuse(source, adapter_forms["folder"], tmp_path / "fused", on_event=events.append)
    told = stages(events)["fusing"]
    done, total, unit = told[-1]
    assert done == total > 100_000
    assert unit == "bytes"
    assert [step[0] for step in told] == sorted(step[0] for step in told)


def test_an_initial_adapter_tells_of_its_matrices(model_folder, tmp_path):
    events = []
    mlx_afm.convert(model_folder, tmp_path / "q", quantization=QuantConfig(mode="balanced"),
                    init_adapter=InitConfig(rank=2), on_event=events.append)  # fmt: skip
    (told,) = stages(events).values()
    assert [step[0] for step in told] == list(range(told[0][1] + 1))
    assert {step[2] for step in told} == {"matrices"}


def test_the_command_line_shows_progress_on_stderr(model_folder, data_folder, tmp_path, cli, slow_clock):
    line = ("--model", model_folder, "--data", data_folder, "--adapter-path", tmp_path / "a", "--batch-size", 1)
    ran = cli("lora", "--train", "--test", *line, "--iters", 1, "--rank", 4, "--json")
    assert ran.json["steps"] == 1
    assert "validation: 2 of 4 batches  " in ran.err
    assert "scoring: 4 of 4 batches  " in ran.err
    ran = cli(
        "fuse", "--model", model_folder, "--adapter-path", tmp_path / "a", "--save-path", tmp_path / "f", "--json"
    )
    assert ran.json["form"] == "dense"
    assert "fusing 0.00 of 0.00 GB  " in ran.err
    ran = cli("convert", "--hf-path", model_folder, "--mlx-path", tmp_path / "q", "-q", "--q-recipe", "apple",
              "--init-adapter", "residual-svd", "--json")  # fmt: skip
    assert ran.json["base_adapter"] == "active"
    assert "computing the initial adapter: 30 of 30 matrices  " in ran.err
    for text in ("ETA", "/s"):
        assert text in ran.err


def test_a_short_validation_adds_no_lines(model_folder, data_folder, tmp_path, cli):
    line = ("--model", model_folder, "--data", data_folder, "--adapter-path", tmp_path / "a", "--rank", 4)
    assert "validation:" not in cli("lora", "--train", *line, "--iters", 1).err
