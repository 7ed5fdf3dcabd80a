"""This checkout against another commit of it, in pairs of one run: is anything slower than it was?

    git worktree add /tmp/before de879f1
    python benchmarks/bench_pairs.py --before /tmp/before [--cases ...] [--repeat 11] [--json FILE]

short_answer       `mlx-afm generate` in a cold process: 8 tokens behind a prompt, all of the command's time
first_token        the same with one token
server_throughput  tokens a second of `mlx-afm serve`: 8 clients, 4 adapters of ranks 4 to 64, answers of 32 tokens
train              `mlx-afm lora`, 20 steps of 4 examples, all of the command's time
prefill, decode    the cases of width 1024 of `bench_generate`, each side by its own checkout's `generate_sides.py`

Model of the first four: width 512, 12 + 6 layers, the demo's tokenizer. A pair is one run of each side, in changing
order; the figure is
the median of now / before (for throughput of before's time / now's), with the bounds between which it lies with 95 %
(percentiles of 2,000 resamples). All run with OpenBLAS.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from measured import commit, described, with_openblas

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results" / "pairs.json"
SIZES = {"vocab_size": 512, "hidden_dim": 512, "num_layers": 18, "num_kv_reuse_layers": 6, "num_heads": 8}
RANKS = (4, 16, 32, 64)
CLIENTS, REQUESTS, TOKENS = 8, 48, 32
QUESTION = "copy vome.go to zasu.txt"
NO_END = {"2": -100, "4": -100}


class Side:
    """One checkout, run by this interpreter."""

    def __init__(self, root: Path, folder: Path) -> None:
        names = folder / f"names-{root.name}"
        names.mkdir()
        (names / "mlx_afm_cli").symlink_to(root / "cli")
        self.root = root
        self.folder = names  # commands run here, where no checkout is found before that of PYTHONPATH
        self.environment = {**os.environ, "PYTHONPATH": f"{root}:{names}"}

    def line(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "mlx_afm", *map(str, words)]

    def run(self, *words: object) -> float:
        """Seconds of one command."""
        started = time.perf_counter()
        subprocess.run(self.line(*words), env=self.environment, cwd=self.folder, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    @contextmanager
    def served(self, *words: object) -> Iterator[str]:
        """A server's address."""
        with subprocess.Popen(
            self.line("serve", "--port", "0", "--json", *words),
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                yield json.loads(process.stdout.readline())["url"]
            finally:
                process.terminate()


def inputs(folder: Path) -> tuple[Path, list[Path]]:
    """A model folder of random weights, and adapters."""
    import mlx.core as mx

    sys.path.insert(0, str(ROOT / "tests"))
    from mlx.utils import tree_flatten

    from mlx_afm.adapters import LoRAConfig, write_adapter_folder
    from mlx_afm.checkpoints.arrays import from_mlx
    from mlx_afm.checkpoints.mlx_checkpoint import write_config
    from mlx_afm.formats.safetensors_file import write_safetensors
    from mlx_afm.model import AFMConfig, Model
    from mlx_afm.workflows.convert import convert
    from mlx_afm.workflows.demo import write_toolkit_folder
    from tiny import random_adapter

    model = convert(write_toolkit_folder(folder / "toolkit"), folder / "model").folder  # for its tokenizer
    base, config = Model(AFMConfig(**SIZES)), AFMConfig(**SIZES)
    mx.random.seed(0)
    values = {name: 0.02 * mx.random.normal(array.shape) for name, array in tree_flatten(base.parameters())}
    write_safetensors(model / "model.safetensors", {name: from_mlx(array) for name, array in values.items()})
    write_config(model, config, {})
    shutil.rmtree(model / "base_adapter", ignore_errors=True)  # of the demo's model
    adapters = []
    for rank in RANKS:
        adapters.append(folder / f"rank{rank}")
        write_adapter_folder(adapters[-1], random_adapter(config, LoRAConfig(rank=rank), seed=rank))
    return model, adapters


def answer(model: Path, tokens: int) -> Callable[[Side], float]:
    return lambda side: side.run("generate", "--model", model, "--prompt", QUESTION, "--max-tokens", tokens)


def throughput(model: Path, adapters: list[Path]) -> Callable[[Side], float]:
    """Seconds of all answers."""
    options = [word for path in adapters for word in ("--adapter", f"{path.name}={path}")]

    def ask(url: str, number: int) -> None:
        name = adapters[number % len(adapters)].name
        asked = {"model": name, "prompt": QUESTION + " " * (number // 8), "max_tokens": TOKENS, "logit_bias": NO_END}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as reply:
            assert json.loads(reply.read())["usage"]["completion_tokens"] == TOKENS

    def measure(side: Side) -> float:
        with side.served("--model", model, *options) as url, ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(lambda number: ask(url, number), range(CLIENTS)))  # the adapters are in memory then
            started = time.perf_counter()
            list(clients.map(lambda number: ask(url, number), range(REQUESTS)))
            return time.perf_counter() - started

    return measure


def train(model: Path, folder: Path) -> Callable[[Side], float]:
    lines = (ROOT / "mlx_afm" / "assets" / "demo" / "data" / "train.jsonl").read_text().splitlines()[:200]
    data = folder / "data"
    data.mkdir()
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")

    def measure(side: Side) -> float:
        with tempfile.TemporaryDirectory() as out:
            words = ["--model", model, "--data", data, "--adapter-path", f"{out}/a", "--iters", 20, "--batch-size", 4]
            return side.run("lora", "--train", *words, "--val-batches", 1)

    return measure


def in_process(run: str, folder: Path) -> Callable[[Side], float]:
    """Seconds of a case of bench_generate, each side in a process that stays."""
    from bench_generate import specs_of

    spec, processes = specs_of(f"{run}_1024", folder)["ours"], dict[str, subprocess.Popen[str]]()

    def ask(side: Side) -> float:
        process = processes.get(side.folder.name)
        if process is None:
            program = side.root / "benchmarks" / "generate_sides.py"
            process = processes[side.folder.name] = subprocess.Popen(
                [sys.executable, str(program), json.dumps(spec)],
                env=side.environment,
                cwd=side.folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert process.stdout is not None
            process.stdout.readline()
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps({"do": "run"}), file=process.stdin, flush=True)
        return float(json.loads(process.stdout.readline())["seconds"])

    return ask


def in_pairs(measure: Callable[[Side], float], now: Side, before: Side, repeat: int) -> dict[str, object]:
    ratios, seconds = [], {"now": [], "before": []}
    for number in range(repeat + 1):
        order = [("now", now), ("before", before)]
        found = {name: measure(side) for name, side in (order if number % 2 else reversed(order))}
        if number:  # the first pair only warms the file cache
            ratios.append(found["now"] / found["before"])
            for name, value in found.items():
                seconds[name].append(value)
    rng = random.Random(0)
    resampled = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {
        "ratio": statistics.median(ratios),
        "from": resampled[50],
        "to": resampled[1949],
        "pairs": repeat,
        **{f"{name}_seconds": statistics.median(values) for name, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--cases", default="short_answer,first_token,server_throughput,train,prefill,decode")
    parser.add_argument("--repeat", type=int, default=11)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    blas = with_openblas()
    results = json.loads(options.json.read_text()) if options.json.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, adapters = inputs(folder)
        now, before = Side(ROOT, folder), Side(options.before.resolve(), folder)
        measures = {
            "short_answer": answer(model, 8),
            "first_token": answer(model, 1),
            "server_throughput": throughput(model, adapters),
            "train": train(model, folder),
            "prefill": in_process("prefill", folder),
            "decode": in_process("decode", folder),
        }
        for case in options.cases.split(","):
            results[case] = {**in_pairs(measures[case], now, before, options.repeat), "commit": commit()}
            print(case, json.dumps(results[case]), flush=True)
            results |= {"before": commit(options.before), "blas": blas, **described("mlx")}
            options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
