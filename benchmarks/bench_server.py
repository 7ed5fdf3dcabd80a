"""What HTTP costs: the server against the engine called directly, and time to the first byte against another commit.

    git worktree add /tmp/before de879f1
    python benchmarks/bench_server.py --before /tmp/before [--repeat 11] [--json FILE]

throughput   tokens a second of 8 clients of `mlx-afm serve` (streams, each event read) / of the engine given the
             same prompts 8 at a time; 4 adapters of ranks 4 to 64, answers of 32 tokens
first_byte   milliseconds from a request for one token to the first byte of its answer, on one connection: now - before

Model, pairs and bounds as in `bench_pairs`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench_pairs import CLIENTS, NO_END, QUESTION, REQUESTS, ROOT, TOKENS, Side, inputs
from measured import commit, described, with_openblas

RESULTS = Path(__file__).resolve().parent / "results" / "server.json"
ASKED_FOR_FIRST_BYTE = 60


def prompts() -> list[str]:
    return [QUESTION + " " * (number // 8) for number in range(REQUESTS)]


def by_engine(model: Path, adapters: list[Path]) -> Callable[[], float]:
    """Seconds of all answers by the engine, in this process."""
    from mlx_afm.generation import GenerateConfig, PrefixCache
    from mlx_afm.generation.engine import Engine, Request
    from mlx_afm.generation.sampling import Sampler
    from mlx_afm.model_folder import ModelFolder
    from mlx_afm.serving.pool import AdapterPool

    tokenizer = ModelFolder(model).tokenizer
    assert tokenizer is not None
    pool = AdapterPool(ModelFolder(model).load_model(), ModelFolder(model), 10**9)
    for path in adapters:
        pool.register(path.name, path)
        pool.acquire(path.name)
    config = GenerateConfig(max_tokens=TOKENS)
    bias = {int(token): value for token, value in NO_END.items()}

    def run() -> float:
        engine = Engine(
            pool.decoder,
            batch_size=CLIENTS,
            routes=pool.routes_of(pool.decoder),
            prefix_cache=PrefixCache(),
            prompts_first=False,
        )
        started, waiting = time.perf_counter(), deque(enumerate(prompts()))
        while waiting or engine.busy:
            while waiting and engine.rows_in_use < CLIENTS and not engine.data_config:
                number, text = waiting.popleft()
                ids = [tokenizer.eos_id, *tokenizer.encode(text)]
                sampler = Sampler(config, logit_bias=bias, prompt=ids)
                engine.add(
                    Request(ids=ids, config=config, samplers=[sampler], adapter=adapters[number % len(adapters)].name)
                )
            for event in engine.step():
                assert event.error is None
        return time.perf_counter() - started

    return run


def by_server(url: str, adapters: list[Path]) -> float:
    """Seconds of all answers by the server."""

    def ask(number: int) -> None:
        asked = {"prompt": prompts()[number], "max_tokens": TOKENS, "logit_bias": NO_END, "stream": True}
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
        body = json.dumps({"model": adapters[number % len(adapters)].name, **asked})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
        connection.close()

    with ThreadPoolExecutor(CLIENTS) as clients:
        started = time.perf_counter()
        list(clients.map(ask, range(REQUESTS)))
        return time.perf_counter() - started


def first_byte(url: str) -> float:
    """Median milliseconds to the first byte of a one-token answer."""
    connection, seconds = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60), []
    for number in range(ASKED_FOR_FIRST_BYTE):
        content = f"{QUESTION} {number}"
        body = json.dumps(
            {"model": "base", "messages": [{"role": "user", "content": content}], "max_tokens": 1, "stream": True}
        )
        started = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.read(1)
        seconds.append(time.perf_counter() - started)
        assert answer.status == 200
        answer.read()
    return 1e3 * statistics.median(seconds[5:])


def bounded(values: list[float]) -> dict[str, float]:
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return {"median": statistics.median(values), "from": medians[50], "to": medians[1949]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=11)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    blas = with_openblas()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, adapters = inputs(folder)
        words = ["--model", model, "--model-id", "base"]
        words += [word for path in adapters for word in ("--adapter", f"{path.name}={path}")]
        now, before = Side(ROOT, folder), Side(options.before.resolve(), folder)
        engine, ratios, differences, tokens = by_engine(model, adapters), [], [], CLIENTS and REQUESTS * TOKENS
        speeds: dict[str, list[float]] = {"server": [], "engine": []}
        bytes_at: dict[str, list[float]] = {"now": [], "before": []}
        with now.served(*words) as url, before.served(*words) as old:
            for number in range(options.repeat + 1):
                pair = [("server", lambda: by_server(url, adapters)), ("engine", engine)]
                found = {side: run() for side, run in (pair if number % 2 else reversed(pair))}
                both = [("now", url), ("before", old)]
                waits = {side: first_byte(place) for side, place in (both if number % 2 else reversed(both))}
                if number:  # the first round warms up
                    ratios.append(found["engine"] / found["server"])
                    differences.append(waits["now"] - waits["before"])
                    for side, seconds in found.items():
                        speeds[side].append(tokens / seconds)
                    for side, value in waits.items():
                        bytes_at[side].append(value)
        result = {
            "throughput": {
                **bounded(ratios),
                **{f"{side}_tokens_per_second": statistics.median(v) for side, v in speeds.items()},
            },
            "first_byte": {
                **bounded(differences),
                **{f"{side}_ms": statistics.median(v) for side, v in bytes_at.items()},
            },
            "pairs": options.repeat,
            "commit": commit(),
            "before": commit(options.before),
            "blas": blas,
            **described("mlx"),
        }
    print(json.dumps(result, indent=2))
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
