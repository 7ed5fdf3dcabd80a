"""Many clients, many adapters: right answers, and memory that stays where it is."""

import http.client
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlx.utils import tree_flatten

from mlx_afm.adapters import LoRAConfig, write_adapter_folder
from mlx_afm.checkpoints.arrays import from_mlx
from mlx_afm.checkpoints.mlx_checkpoint import write_config
from mlx_afm.formats.safetensors_file import write_safetensors
from mlx_afm.model import AFMConfig
from mlx_afm.serving import ServeConfig, running
from serving_client import REQUESTS, chat, gauge
from tiny import random_adapter, tiny_model

ADAPTERS = ("whole", "small", "some", "dora")
TOKENS = 12
CLIENTS, ALL, WARM_UP = 8, 500, 150
MIDDLE = {"vocab_size": 512, "hidden_dim": 512, "num_layers": 8, "num_kv_reuse_layers": 3, "num_heads": 8}


class Client:
    """One connection that is kept."""

    def __init__(self, url):
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._connection.close()

    def get(self, path):
        self._connection.request("GET", path)
        return self._connection.getresponse().read().decode()

    def ask(self, model, text, **settings):
        body = json.dumps({"model": model, "messages": chat(text), "max_tokens": TOKENS, **settings})
        self._connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        reply = self._connection.getresponse()
        data = reply.read()
        assert reply.status == 200, data
        if not settings.get("stream"):
            return json.loads(data)["choices"][0]["message"]["content"]
        events = [json.loads(line[6:]) for line in data.decode().split("\n\n") if line.startswith("data: {")]
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def metrics_of(url):
    with Client(url) as client:
        return client.get("/metrics")


def ask_once(url, model):
    with Client(url) as client:
        return client.ask(model, REQUESTS[0])


def ask_all(url, count, seed):
    """Answers to requests at random, from all clients at once: (model, text, answer) each."""

    def run(number):
        rng = random.Random(f"{seed} {number}")
        wanted = [
            (rng.choice(ADAPTERS), rng.choice(REQUESTS), rng.random() < 0.3) for _ in range(number, count, CLIENTS)
        ]
        with Client(url) as client:
            return [(model, text, client.ask(model, text, stream=stream)) for model, text, stream in wanted]

    with ThreadPoolExecutor(CLIENTS) as pool:
        return [answer for answers in pool.map(run, range(CLIENTS)) for answer in answers]


def require_right(answers, alone):
    wrong = [(model, text) for model, text, answer in answers if answer != alone(model, text, max_tokens=TOKENS)]
    assert wrong == []


def test_clients_at_once_get_what_each_alone_gets(server, alone):
    answers = ask_all(server.url, 40, seed=1)
    assert len(answers) == 40
    require_right(answers, alone)


ADD_FOUR = """
import json
import sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_afm.model_folder import ModelFolder
from mlx_afm.generation import Engine, Request
from mlx_afm.serving.pool import AdapterPool

folder, *paths = map(Path, sys.argv[1:])
model = ModelFolder(folder).load_model()
mx.eval(model.parameters())
base = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
pool = AdapterPool(model, ModelFolder(folder), 10**9)
mx.clear_cache()
mx.reset_peak_memory()
for path in paths:
    pool.register(path.name, path)
    pool.acquire(path.name)
loading = mx.get_peak_memory()
engine = Engine(pool.decoder, routes=pool.routes_of(pool.decoder))
for number, path in enumerate(paths):
    engine.add(Request(ids=list(range(1, 17)), adapter=path.name, max_tokens=16))
while engine.busy:
    engine.step()
print(json.dumps({"base": base, "adapters": pool.held_bytes, "loading": loading, "peak": mx.get_peak_memory()}))
"""


@pytest.mark.slow
def test_one_base_and_four_adapters_are_all_that_is_in_memory(middle_folder):
    """Peak while adapters are read from disk and used in one batch, in a process that does nothing else."""
    folder, adapters = middle_folder
    command = [sys.executable, "-c", ADD_FOUR, str(folder), *map(str, adapters.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    wanted = told["base"] + told["adapters"]
    print({**told, "over": told["peak"] / wanted - 1})
    assert wanted <= told["loading"] <= told["peak"] <= 1.1 * wanted


def resident_bytes(process):
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(process.pid)], capture_output=True, text=True, check=True)
    return 1024 * int(told.stdout)


@pytest.mark.slow
def test_five_hundred_requests(model_folder, served_adapters, bytes_in_memory, alone):
    """8 clients over 4 adapters against the program: all answers right, and no growth after the warm-up.

    There is room for two of the four adapters, so they come and go all the time.
    """
    limit = sum(sorted(map(bytes_in_memory, served_adapters.values()))[-2:])
    command = [sys.executable, "-m", "mlx_afm", "serve", "--model", model_folder, "--port", "0", "--json"]
    command += [f"--adapter={name}={served_adapters[name]}" for name in ADAPTERS] + [f"--adapter-memory={limit}"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = json.loads(process.stdout.readline())["url"]
            answers = ask_all(url, WARM_UP, seed=2)
            settled = resident_bytes(process)
            answers += ask_all(url, ALL - WARM_UP, seed=3)
            grown = resident_bytes(process) - settled
            metrics = metrics_of(url)
        finally:
            process.kill()
    require_right(answers, alone)
    assert len(answers) == ALL
    told = {name: gauge(metrics, name) for name in ("adapter_bytes", "peak_memory_bytes", "completion_tokens_total")}
    print({"grown": grown, "settled": settled, **told})
    assert told["adapter_bytes"] <= limit
    assert grown <= 0.06 * settled


@pytest.fixture
def middle_folder(model_folder, tmp_path):
    """A model of 19 million weights and its four adapters: large enough for memory to be weights."""
    folder, model = tmp_path / "middle", tiny_model(**MIDDLE)
    folder.mkdir()
    weights = {name: from_mlx(array) for name, array in tree_flatten(model.parameters())}
    write_safetensors(folder / "model.safetensors", weights, {"format": "mlx"})
    write_config(folder, AFMConfig(**MIDDLE), {})
    (folder / "tokenizer.model").write_bytes((model_folder / "tokenizer.model").read_bytes())
    for number in range(4):
        adapter = random_adapter(model.args, LoRAConfig(rank=16), seed=number)
        write_adapter_folder(tmp_path / str(number), adapter)
    return folder, {str(number): tmp_path / str(number) for number in range(4)}


@pytest.mark.slow
def test_a_server_holds_the_base_once(middle_folder):
    """Peak of the whole program while all four adapters are in use at once."""
    folder, adapters = middle_folder
    code = (
        "import asyncio, json, sys; from pathlib import Path; from mlx_afm.serving import ServeConfig, serve\n"
        "adapters = {p.name: p for p in map(Path, sys.argv[2:])}\n"
        "ready = lambda s: print(json.dumps({'url': s.url}), flush=True)\n"
        "asyncio.run(serve(sys.argv[1], adapters, ServeConfig(port=0), ready))\n"
    )
    command = [sys.executable, "-c", code, str(folder), *map(str, adapters.values())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = json.loads(process.stdout.readline())["url"]
            before = gauge(metrics_of(url), "active_memory_bytes")
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda name: ask_once(url, name), adapters))
            metrics = metrics_of(url)
        finally:
            process.kill()
    wanted, peak = before + gauge(metrics, "adapter_bytes"), gauge(metrics, "peak_memory_bytes")
    print({"base": before, "adapters": gauge(metrics, "adapter_bytes"), "peak": peak, "over": peak / wanted - 1})
    assert gauge(metrics, "adapter_bytes") > 0.04 * before
    assert peak <= 1.1 * wanted


def test_running_reports_what_keeps_it_from_starting(tmp_path):
    with pytest.raises(ValueError, match="no such folder"), running(tmp_path / "none", {}, ServeConfig(port=0)):
        raise AssertionError
