"""mlx-lm's three programs on what `fuse` writes: dense as it is; codes by the shim, with the adapter beside them."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import pytest
from mlx_lm.tuner.trainer import default_loss

import mlx_afm
from mlx_afm.adapters import LoRAConfig
from mlx_afm.quant import QuantConfig
from tiny import random_tokens, tiny_model, with_adapter

QUESTIONS = ("ls", "copy notes.txt to archive", "how many lines are in data.csv", "delete the folder old_logs")
TOKENS = 8
SECONDS = 120


@pytest.fixture(scope="module", params=["dense", "codes"])
def program(request, model_folder, adapter_forms, tmp_path_factory):
    """A function from a program's name to its command line, a question, and what our own `generate` answers."""
    folder, model = tmp_path_factory.mktemp("fused"), model_folder
    if request.param == "codes":
        model = mlx_afm.convert(model_folder, folder / "codes", quantization=QuantConfig(bits=4)).folder
    fused = mlx_afm.fuse(model, adapter_forms["folder"], folder / "fused").folder
    options = ["--model", str(fused)]
    if request.param == "codes":
        options += ["--trust-remote-code", "--adapter-path", str(fused / "base_adapter")]
    ours, tokenizer = mlx_afm.load(fused)
    answers = {
        text: mlx_afm.generate(ours, tokenizer, [{"role": "user", "content": text}], max_tokens=TOKENS).strip()
        for text in QUESTIONS
    }
    question = max(answers, key=lambda text: len(answers[text]))  # random weights often say nothing but spaces
    assert len(answers[question]) > 3
    return lambda name: [sys.executable, "-m", "mlx_lm", name, *options], question, answers[question]


def test_generate(program):
    line, question, answer = program
    words = ["--prompt", question, "--max-tokens", str(TOKENS), "--verbose", "False"]
    done = subprocess.run([*line("generate"), *words], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert answer in done.stdout


def test_chat(program):
    line, question, answer = program
    words, typed = ["--max-tokens", str(TOKENS)], f"{question}\nq\n"
    done = subprocess.run([*line("chat"), *words], input=typed, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert answer in done.stdout


def test_server(program):
    line, question, answer = program
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = {"messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(asked).encode(),
        headers={"Content-Type": "application/json"},
    )
    server = subprocess.Popen([*line("server"), "--port", str(port)], stderr=subprocess.PIPE, text=True)
    try:
        said = json.loads(answer_of(request, server))
    finally:
        server.terminate()
        server.communicate(timeout=SECONDS)
    assert said["choices"][0]["message"]["content"].strip() == answer


def answer_of(request, server) -> bytes:
    """What the server answers once it listens."""
    deadline = time.monotonic() + SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answered:
                return answered.read()
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.1)
    raise AssertionError(server.communicate()[1])


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
def test_a_training_step_of_our_model_as_mlx_lm_compiles_it(dropout):
    """`mlx_lm.lora` compiles its step with all states; it includes what is recomputed, and dropout."""
    model = with_adapter(tiny_model(), LoRAConfig(rank=4, dropout=dropout))
    model.train()
    optimizer = optimizers.Adam(learning_rate=1e-2)
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_grad = nn.value_and_grad(model, default_loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch, lengths):
        (loss, _), gradients = loss_and_grad(model, batch, lengths)
        optimizer.update(model, gradients)
        return loss

    batch, lengths = random_tokens((2, 9)), mx.array([[0, 9], [2, 9]])
    losses = [step(batch, lengths).item() for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]


def test_lora(model_folder, tmp_path):
    """`mlx_lm.lora` itself."""
    answer = {"role": "assistant", "content": "rm -r"}
    lines = [{"messages": [{"role": "user", "content": question}, answer]} for question in QUESTIONS]
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    program = "import mlx_afm; mlx_afm.register(); from mlx_lm.lora import main; main()"
    options = {
        "--model": model_folder, "--data": tmp_path, "--adapter-path": tmp_path / "adapter", "--iters": 20,
        "--batch-size": 2, "--num-layers": 2, "--learning-rate": "1e-2", "--steps-per-report": 10, "--val-batches": 1,
        "--max-seq-length": 64,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    line = [sys.executable, "-c", program, "--train", "--grad-checkpoint", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=5 * SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    losses = [float(loss) for loss in re.findall(r"val(?: loss)? +([0-9.]+)", shown, re.IGNORECASE)]
    assert len(losses) == 2, shown
    assert losses[1] < 0.9 * losses[0]
    assert (tmp_path / "adapter" / "adapters.safetensors").is_file()
