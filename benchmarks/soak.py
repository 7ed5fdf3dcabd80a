"""A server under load for a long time: right answers, memory that stays, no row lost, and an end in order.

    python benchmarks/soak.py [--minutes 20] [--clients 16] [--least 5000] [--json FILE]

`mlx-afm serve` runs on the demo's model with six adapters (four LoRA ranks, two of them added and removed at run time,
and one DoRA). Each client asks, streams or not, at random; one request in twenty hangs up: at once, or in the middle of
its stream. Every answer that came to its end is compared with what one user alone gets. Resident memory is read after
the first 1,000 requests and at the end. Then the server gets SIGTERM while all clients ask: each must get its answer or
a clear refusal, and the server must end with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "serving")]

from measured import commit, described  # noqa: E402

import mlx_afm  # noqa: E402
from mlx_afm.adapters import LoRAConfig, write_adapter_folder  # noqa: E402
from mlx_afm.model_folder import ModelFolder  # noqa: E402
from mlx_afm.workflows.convert import convert  # noqa: E402
from mlx_afm.workflows.demo import write_toolkit_folder  # noqa: E402
from serving_client import REQUESTS, chat  # noqa: E402
from tiny import random_adapter  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "soak.json"
ADAPTERS = {
    "rank4": LoRAConfig(rank=4, scale=2.0),
    "rank8": LoRAConfig(rank=8, targets=("q", "v", "down"), layers="1-4"),
    "rank32": LoRAConfig(rank=32),
    "dora": LoRAConfig(rank=4, fine_tune_type="dora"),
    "guest4": LoRAConfig(rank=4),
    "guest16": LoRAConfig(rank=16),
}
GUESTS = ("guest4", "guest16")
TOKENS = (1, 8, 24)
HANG_UP = 0.05
WARM_UP = 1000


@dataclass
class Tally:
    """What happened to all requests."""

    finished: int = 0
    different: list[str] = field(default_factory=list)
    hung_up: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass
class Soak:
    """Clients against one server.

    Attributes:
        url: of the server.
        answers: what one user alone gets, by model, request and number of tokens.
        folder: where the adapters are.
        tally: what happened.
        stopping: whether the server was told to stop, so that refusals are right.
    """

    url: str
    answers: dict[tuple[str, str, int], str]
    folder: Path
    tally: Tally = field(default_factory=Tally)
    stopping: bool = False

    async def client(self, number: int, until: float) -> None:
        rng = random.Random(number)
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as http:
            while time.monotonic() < until:
                try:
                    await self.ask(http, rng)
                except httpx.HTTPError as error:
                    if self.stopping:  # the connection was refused: nothing listens any more
                        self.tally.refused[type(error).__name__] += 1
                        return
                    self.tally.faults.append(f"{type(error).__name__}: {error}")
                if self.stopping:
                    return

    async def ask(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        model, text = rng.choice(["base", *ADAPTERS]), rng.choice(REQUESTS)
        tokens, stream = rng.choice(TOKENS), rng.random() < 0.5
        body = {"model": model, "messages": chat(text), "max_tokens": tokens, "stream": stream}
        if rng.random() < HANG_UP:
            await self.hang_up(http, body, rng)
            return
        async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            said = (await reply.aread()).decode()
        if reply.status_code != 200:
            self.note_refusal(model, reply.status_code, said)
            return
        found = text_of(said, stream)
        if found is None:
            if self.stopping and '"error"' in said:
                self.tally.refused["error in the stream"] += 1
            else:
                self.tally.faults.append(f"{model}: a stream without an end: {said[-200:]}")
            return
        self.tally.finished += 1
        if found != self.answers[model, text, tokens]:
            self.tally.different.append(f"{model}, {text}, {tokens}: {found!r}")

    async def hang_up(self, http: httpx.AsyncClient, body: dict, rng: random.Random) -> None:
        self.tally.hung_up += 1
        async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
            if rng.random() < 0.5:
                async for _ in reply.aiter_raw():
                    break

    def note_refusal(self, model: str, status: int, said: str) -> None:
        code = json.loads(said)["error"]["code"]
        expected = (model in GUESTS and status == 404) or (self.stopping and status == 503)
        if expected:
            self.tally.refused[f"{status} {code}"] += 1
        else:
            self.tally.faults.append(f"{model}: {status} {said[:200]}")

    async def move_guests(self, until: float) -> None:
        """Adds and removes the two adapters that come and go."""
        rng, here = random.Random(-1), set(GUESTS)
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as http:
            while time.monotonic() < until:
                await asyncio.sleep(rng.uniform(0.2, 2.0))
                name = rng.choice(GUESTS)
                if name in here:
                    reply = await http.delete(f"/admin/adapters/{name}")
                else:
                    reply = await http.post("/admin/adapters", json={"name": name, "path": str(self.folder / name)})
                if reply.status_code != 200:
                    self.tally.faults.append(f"{name}: {reply.status_code} {reply.text[:200]}")
                here ^= {name}


def text_of(said: str, stream: bool) -> str | None:
    """The answer's text; None for a stream that broke off."""
    if not stream:
        return json.loads(said)["choices"][0]["message"]["content"]
    events = [line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return None
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])


def answers_alone(model: Path, folder: Path) -> dict[tuple[str, str, int], str]:
    found = {}
    for name in ("base", *ADAPTERS):
        pair = mlx_afm.load(model, None if name == "base" else folder / name)
        for text in REQUESTS:
            for tokens in TOKENS:
                found[name, text, tokens] = mlx_afm.generate(*pair, chat(text), max_tokens=tokens)
    return found


def resident_bytes(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


async def gauges(url: str) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=url) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    pairs = [line.split() for line in lines if not line.startswith("#") and "{" not in line]
    return {name: float(value) for name, value in pairs}


async def run_load(soak: Soak, process: subprocess.Popen, options: argparse.Namespace) -> dict:
    until, memory = time.monotonic() + 60 * options.minutes, {}
    tasks = [asyncio.ensure_future(soak.client(n, until)) for n in range(options.clients)]
    guests = asyncio.ensure_future(soak.move_guests(until))
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0.2)
        if not memory and soak.tally.finished >= WARM_UP:
            memory["after_warm_up_bytes"] = resident_bytes(process.pid)
    await guests
    await asyncio.sleep(1)  # rows of those who hung up are freed with the next token
    memory["at_the_end_bytes"] = resident_bytes(process.pid)
    left = await gauges(soak.url)
    memory["growth"] = memory["at_the_end_bytes"] / memory.get("after_warm_up_bytes", memory["at_the_end_bytes"]) - 1
    return {**memory, "rows_left": left["mlx_afm_rows"], "waiting_left": left["mlx_afm_waiting"]}


async def stop_in_the_middle(soak: Soak, process: subprocess.Popen, clients: int) -> dict:
    before = soak.tally.finished
    tasks = [asyncio.ensure_future(soak.client(1000 + n, time.monotonic() + 60)) for n in range(clients)]
    await asyncio.sleep(3)
    soak.stopping = True
    process.send_signal(signal.SIGTERM)
    await asyncio.gather(*tasks)
    code = await asyncio.to_thread(process.wait, 60)
    return {"exit_code": code, "answers": soak.tally.finished - before}


def measure(options: argparse.Namespace, folder: Path) -> dict:
    model = convert(write_toolkit_folder(folder / "toolkit"), folder / "model").folder
    for number, (name, config) in enumerate(ADAPTERS.items()):
        write_adapter_folder(folder / name, random_adapter(ModelFolder(model).config, config, seed=number))
    answers = answers_alone(model, folder)
    given = [word for name in ADAPTERS for word in ("--adapter", f"{name}={folder / name}")]
    line = ["serve", "--model", model, "--port", options.port, "--model-id", "base", "--admin-root", folder, *given]
    words = [str(word) for word in (sys.executable, "-m", "mlx_afm", *line)]
    with (folder / "log").open("w") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        try:
            soak = Soak(f"http://127.0.0.1:{options.port}", answers, folder)
            wait_for(soak.url, process)
            memory = asyncio.run(run_load(soak, process, options))
            stopped = asyncio.run(stop_in_the_middle(soak, process, options.clients))
        finally:
            process.kill()
        log_lines = (folder / "log").read_text().splitlines()
    tally = soak.tally
    return {
        "minutes": options.minutes,
        "clients": options.clients,
        "requests_finished": tally.finished,
        "answers_that_differ": len(tally.different),
        "hung_up": tally.hung_up,
        "refused": dict(tally.refused),
        "faults": tally.faults[:20],
        "first_differences": tally.different[:5],
        **memory,
        "stopped": stopped,
        "last_log_lines": log_lines[-3:],
    }


def wait_for(url: str, process: subprocess.Popen) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.ConnectError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--least", type=int, default=5000, help="requests that must have finished")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    found |= {"commit": commit(), **described("mlx")}
    print(json.dumps(found, indent=2))
    options.json.write_text(json.dumps(found, indent=2) + "\n")
    good = (
        not found["answers_that_differ"]
        and not found["faults"]
        and found["growth"] < 0.02
        and found["rows_left"] == found["waiting_left"] == 0
        and found["stopped"]["exit_code"] == 0
        and found["requests_finished"] >= options.least
    )
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
