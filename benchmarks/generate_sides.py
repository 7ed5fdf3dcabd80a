"""The two sides of bench_generate.py, each alone in a process: it loads weights, then obeys lines on stdin.

                                    ->  {"ready": true}   of its own accord
    {"do": "run"}                   ->  {"seconds": ..., "cpu_seconds": ..., "tokens": [...], ...}
    {"do": "peak"}                  ->  {"mlx_peak_bytes": ...}

`seconds` is what the case is about: see RUNS. The same case of both sides has the same weights and the same prompt,
and greedy tokens, which are compared.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

Tokens = Iterator[int]
Run = Callable[[], dict[str, Any]]


def prompt_ids(spec: dict, count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, spec["config"]["vocab_size"], count).tolist()


class Ours:
    """What mlx-afm does."""

    def __init__(self, spec: dict) -> None:
        from mlx_afm.generation import GenerateConfig, PrefixCache

        self.spec, self.config = spec, GenerateConfig(max_tokens=4096, temp=spec.get("temp", 0.0), seed=1)
        self.model = self.load(spec["config"], spec["weights"])
        self.prefixes = PrefixCache()
        self.routes: Any = None  # of adapters beside each other
        self.stacks: Any = None
        self.adapter: str | None = None

    @staticmethod
    def load(config: dict, weights: str) -> Any:
        from mlx_afm.model import AFMConfig, Model

        model = Model(AFMConfig(**config))
        model.load_weights(weights)
        model.eval()
        mx.eval(model.parameters())
        return model

    def steps(self, ids: list[int], count: int, *, cached: bool = False) -> Tokens:
        return self._answer(ids, count, prefix_cache=self.prefixes if cached else None)

    def _answer(self, ids: list[int], count: int, *, seed: int = 1, **options: Any) -> Tokens:
        from mlx_afm.generation.engine import Engine, Request
        from mlx_afm.generation.forms import decoder_of

        held = decoder_of(self.model)
        engine = Engine(held.decoder, routes=self.routes or held.routes, **options)
        engine.add(Request(ids=ids, config=replace(self.config, seed=seed), max_tokens=count, adapter=self.adapter))
        while engine.busy:
            for event in engine.step():
                yield event.token.token

    def switch(self, number: int) -> None:
        from mlx_afm.adapters import attach_adapter, read_adapter, remove_adapter

        paths = [Path(path) for path in self.spec["adapters"]]
        if self.spec["from_file"]:
            remove_adapter(self.model)
            attach_adapter(self.model, read_adapter(paths[number % 2], self.model.args), where=paths[number % 2])
            self.model.eval()
            mx.eval(self.model.parameters())
            return
        if self.routes is None:  # in the warm-up
            self.stack(paths)
        self.adapter = paths[number % 2].name

    def stack(self, paths: list[Path]) -> None:
        """Puts adapters beside each other."""
        from mlx_afm.adapters import read_adapter
        from mlx_afm.adapters.inference import AdapterStacks
        from mlx_afm.checkpoints.arrays import to_mlx
        from mlx_afm.generation.forms import decoder_of

        stacks = AdapterStacks(decoder_of(self.model).decoder.form)
        for path in paths:
            adapter = read_adapter(path, self.model.args)
            read = {name: to_mlx(tensor).astype(mx.float32) for name, tensor in adapter.weights.items()}
            weights = {name: (lambda array=array: array) for name, array in read.items()}
            stacks.add(path.name, weights, adapter.config.scale)
        self.stacks, self.routes = stacks, stacks.routes

    def answers(self, prompts: list[list[int]], names: list[str], count: int, *, turns: bool) -> list[list[int]]:
        """Answers of rows with these adapters: in one batch, or a batch for each adapter in turn."""
        from mlx_afm.generation.engine import Engine, Request
        from mlx_afm.generation.forms import decoder_of

        decoder, found = decoder_of(self.model).decoder, {}
        groups = [[n for n, name in enumerate(names) if name == each] for each in sorted(set(names))]
        for group in groups if turns else [list(range(len(names)))]:
            engine = Engine(decoder, routes=self.routes)
            for n in group:
                request = Request(ids=prompts[n], config=self.config, max_tokens=count, adapter=names[n])
                found[n] = engine.add(request)[0]
            while engine.busy:
                engine.step()
        return [found[n].tokens for n in range(len(prompts))]

    def speculate(self, ids: list[int], count: int, seed: int) -> tuple[Tokens, Any]:
        from mlx_afm.generation.speculation import Speculation

        if not hasattr(self, "draft"):
            self.draft = self.load(*self.spec["draft"])
        speculation = Speculation(draft=self.draft, num_draft_tokens=5)
        return self._answer(ids, count, seed=seed, speculation=speculation), speculation


class MlxLm:
    """What mlx-lm does with its own afm7."""

    def __init__(self, spec: dict) -> None:
        self.spec = spec
        self.model = self.load(spec["config"], spec["weights"])
        self.kept: Any = None

    @staticmethod
    def load(config: dict, weights: str) -> Any:
        from mlx_lm.models import afm7

        model = afm7.Model(afm7.ModelArgs(model_type="afm7", **config))
        model.load_weights(weights)
        mx.eval(model.parameters())
        return model

    def steps(self, ids: list[int], count: int, *, cached: bool = False) -> Tokens:
        from mlx_lm.generate import generate_step
        from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
        from mlx_lm.sample_utils import make_sampler

        sampler = make_sampler(temp=self.spec.get("temp", 0.0))
        cache, known = make_prompt_cache(self.model), 0
        if cached and self.kept is not None:  # as its server has it: a copy, cut to what is alike
            old, held = self.kept
            known = next(i for i in range(len(ids)) if i == len(old) or ids[i] != old[i])
            cache = copy.deepcopy(held)
            trim_prompt_cache(cache, cache[0].offset - known)
        steps = generate_step(mx.array(ids[known:]), self.model, max_tokens=count, sampler=sampler, prompt_cache=cache)
        for token, _ in steps:
            yield token
        mx.synchronize()
        if cached:
            self.kept = (ids, cache)

    def switch(self, number: int) -> None:
        """A server's way to another adapter: the model again, with it. (Its own check refuses its fused names.)"""
        from mlx_lm.tuner.utils import linear_to_lora_layers

        self.model = None
        model = self.load(self.spec["config"], self.spec["weights"])
        linear_to_lora_layers(model, len(model.layers), {"rank": 16, "scale": 0.5, "dropout": 0.0})
        model.load_weights(self.spec["mlx_lm_adapters"][number % 2], strict=False)
        model.eval()
        mx.eval(model.parameters())
        self.model = model


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    started, worked = time.perf_counter(), time.process_time()
    value = work()
    return time.perf_counter() - started, time.process_time() - worked, value


def first_token(side: Ours | MlxLm, ids_of: Callable[[int], list[int]], **options: Any) -> Run:
    """Seconds to the first token of an answer to the nth prompt."""
    number = [0]

    def run() -> dict[str, Any]:
        number[0] += 1
        steps = side.steps(ids_of(number[0]), 1, **options)
        seconds, cpu_seconds, token = timed(lambda: next(steps))
        list(steps)
        mx.synchronize()
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": [token]}

    return run


def prefill(side: Ours | MlxLm, spec: dict) -> Run:
    return first_token(side, lambda number: prompt_ids(spec, spec["prompt_tokens"], seed=number))


def decode(side: Ours | MlxLm, spec: dict) -> Run:
    """Seconds a token, after the first."""
    ids, count = prompt_ids(spec, spec["prompt_tokens"]), spec["answer_tokens"]

    def run() -> dict[str, Any]:
        steps = side.steps(ids, count)
        tokens = [next(steps)]
        seconds, cpu_seconds, others = timed(lambda: [next(steps) for _ in range(count - 1)])
        list(steps)
        mx.synchronize()
        each = count - 1
        return {"seconds": seconds / each, "cpu_seconds": cpu_seconds / each, "tokens": tokens + others}

    return run


def cached(side: Ours | MlxLm, spec: dict) -> Run:
    """Seconds to the first token of an answer to 20 tokens behind a system prompt that was there before."""
    questions = behind_system_prompt(spec)
    list(side.steps(questions(0), 1, cached=True))
    return first_token(side, questions, cached=True)


def uncached(side: Ours | MlxLm, spec: dict) -> Run:
    """The same prompts, whole."""
    return first_token(side, behind_system_prompt(spec))


def behind_system_prompt(spec: dict) -> Callable[[int], list[int]]:
    system = prompt_ids(spec, spec["prompt_tokens"], seed=1)
    return lambda number: system + prompt_ids(spec, 20, seed=100 + number)


def adapter(side: Ours | MlxLm, spec: dict) -> Run:
    """Seconds until the other of two adapters is in place."""
    ids, number = prompt_ids(spec, 8), [0]

    def run() -> dict[str, Any]:
        number[0] += 1
        seconds, cpu_seconds, _ = timed(lambda: side.switch(number[0]))
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": list(side.steps(ids, 3))}

    return run


def speculative(side: Ours, spec: dict) -> Run:
    """Seconds a token with a draft model, after the first; another answer each time."""
    ids, count, seed = prompt_ids(spec, spec["prompt_tokens"]), spec["answer_tokens"], [0]

    def run() -> dict[str, Any]:
        seed[0] += 1
        steps, speculation = side.speculate(ids, count, seed[0])
        tokens = [next(steps)]
        seconds, cpu_seconds, others = timed(lambda: [next(steps) for _ in range(count - 1)])
        list(steps)
        answer = {"seconds": seconds / (count - 1), "cpu_seconds": cpu_seconds / (count - 1)}
        facts = {"drafted": speculation.drafted, "accepted": speculation.accepted, "rounds": speculation.rounds}
        return {**answer, "tokens": tokens + others, **facts}

    return run


def mixed(side: Ours, spec: dict) -> Run:
    """Seconds of 8 rows over 4 adapters, prompts included; `turns` answers each adapter's rows alone."""
    paths = [Path(path) for path in spec["adapters"]]
    side.stack(paths)
    prompts = [prompt_ids(spec, spec["prompt_tokens"], seed=row) for row in range(8)]
    names = [paths[row % len(paths)].name for row in range(8)]

    def run() -> dict[str, Any]:
        work = partial(side.answers, prompts, names, spec["answer_tokens"], turns=spec["turns"])
        seconds, cpu_seconds, answers = timed(work)
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": [token for row in answers for token in row]}

    return run


RUNS = {
    "mixed": mixed,
    "prefill": prefill,
    "decode": decode,
    "cached": cached,
    "uncached": uncached,
    "adapter": adapter,
    "speculative": speculative,
}


def main() -> None:
    spec = json.loads(sys.argv[1])
    side = {"ours": Ours, "mlx-lm": MlxLm}[spec["side"]](spec)
    run = RUNS[spec["run"]](side, spec)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if json.loads(line)["do"] == "peak":
            answer: dict[str, Any] = {"mlx_peak_bytes": mx.get_peak_memory()}
        else:
            answer = run()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
