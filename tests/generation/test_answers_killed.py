"""A command that answers a file, killed for real at random moments."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from mlx_afm.generation import GenerateConfig
from mlx_afm.workflows.answer import AnswerJob, answer_file
from mlx_afm.workflows.demo import ASSETS


@pytest.mark.slow
def test_killed_ten_times_the_answers_are_those_of_one_go(model_folder, tmp_path):
    lines = (ASSETS / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    prompts, output, rng = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl", random.Random(4)
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    whole = AnswerJob(
        model=model_folder,
        prompts=prompts,
        output=tmp_path / "whole.jsonl",
        config=GenerateConfig(max_tokens=24),
        batch_size=2,
    )
    answer_file(whole)
    line = [
        sys.executable,
        "-m",
        "mlx_afm",
        "generate",
        "--model",
        model_folder,
        "--prompt",
        prompts,
        "--output",
        output,
    ]
    line += ["--max-tokens", 24, "--batch-size", 2, "--json"]
    part, kept, kills = tmp_path / "answers.jsonl.part", 0, 0
    while not output.exists():
        started = len(part.read_bytes().splitlines()) if part.exists() else 0
        assert started >= kept
        kept = started
        with subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            if kills < 10:
                deadline = time.monotonic() + 60
                while (len(part.read_bytes().splitlines()) if part.exists() else 0) <= started:
                    if process.poll() is not None or time.monotonic() > deadline:
                        break
                    time.sleep(0.005)
                time.sleep(rng.uniform(0, 0.05))
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
            else:
                told = json.loads(process.communicate()[0])
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert kills == 10
    assert told["new"] < 60
