"""Our way from a file to tokens and targets against tamm's preprocessor and mlx-lm's data sets.

    python benchmarks/bench_data.py --data FILE [--model FOLDER] [--repeat 5] [--json FILE]

FILE holds a list of messages a line. Without --model everything is done with two tokenizers: the demo's (unigram, 512
pieces), and one of the kind that large models have today (BPE, bytes for what is unknown, digits one by one, no
normalisation), of 8,000 pieces trained on FILE's own texts; what is found with it is named `bpe`. All contenders run
in one go, interleaved, each in a process of its own, and each turn begins with another one; medians.
Timed is what lies between the file on disk and the tokens of all examples with their targets; imports and loading the
tokenizer are not. CPU seconds are those of all processes of a contender, which a busy machine changes less. Everybody
encodes the same lines, and the sums of tokens and targets are compared. A ratio is ours / other.

ours            read_tokens in one process, no cache: every record is checked, and fingerprinted for duplicates
ours-workers    the same with the default workers
ours-cached     the second start: from the cache
tamm            JSON lines through AFMChatTemplateV6Preprocessor, labels included; nothing is checked
mlx-lm          JSON lines through ChatDataset(mask_prompt=True) in CacheDataset, with the tokenizer that mlx-lm loads
mlx-lm-ours     the same with our tokenizer in mlx-lm's wrapper
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from measured import Measured, described, read_once, run

RESULTS = Path(__file__).resolve().parent / "results" / "data.json"
BPE_PIECES = 8000
OURS = ("ours", "ours-workers", "ours-cached")
OTHERS = ("tamm", "mlx-lm", "mlx-lm-ours")

Found = dict[str, list[tuple[dict[str, float], Measured]]]
Encode = Callable[[], tuple[int, int, int]]  # examples, tokens, targets


def ours(data: Path, model: Path, **settings: object) -> Encode:
    from mlx_afm.data import read_tokens

    with tempfile.TemporaryDirectory() as folder, data.open("rb") as lines:
        first = Path(folder) / "first.jsonl"
        first.write_bytes(lines.readline())
        read_tokens((first,), model / "tokenizer.model", workers=1)  # the tokenizer is loaded now, as the others' are

    def encode() -> tuple[int, int, int]:
        table = read_tokens((data,), model / "tokenizer.model", **settings)
        return len(table), len(table.ids), int(table.trained.sum())

    return encode


def tamm(data: Path, model: Path) -> Encode:
    from tamm.preprocessors.instruct_lm.afm import AFMChatTemplateV6Preprocessor
    from tamm.tokenizers.afm import AFMTokenizer

    from mlx_afm.text.tokenizer import AFMTokenizer as OurTokenizer

    turn_end = OurTokenizer.from_file(model / "tokenizer.model").turn_end_id
    spec = AFMTokenizer(str(model / "tokenizer.model"), extra_properties={"eot_id": turn_end})
    makers = {flag: AFMChatTemplateV6Preprocessor(spec, prepend_system_message=flag) for flag in (True, False)}

    def encode() -> tuple[int, int, int]:
        with data.open(encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        made = [makers[record[0]["role"] != "system"](record) for record in records]
        targets = sum(len(example.label_ids) - example.label_ids.count(-100) for example in made)
        return len(made), sum(len(example.input_ids) for example in made), targets

    return encode


def mlx_lm(data: Path, model: Path, our_tokenizer: bool) -> Encode:
    from mlx_lm.tokenizer_utils import TokenizerWrapper, load
    from mlx_lm.tuner.datasets import CacheDataset, ChatDataset

    from mlx_afm.text.tokenizer import AFMTokenizer

    tokenizer = TokenizerWrapper(AFMTokenizer.from_file(model / "tokenizer.model")) if our_tokenizer else load(model)

    def encode() -> tuple[int, int, int]:
        with data.open(encoding="utf-8") as lines:
            records = [{"messages": json.loads(line)} for line in lines]
        cached = CacheDataset(ChatDataset(records, tokenizer, mask_prompt=True))
        made = [cached[index] for index in range(len(cached))]
        return len(made), sum(len(ids) for ids, _ in made), sum(len(ids) - offset for ids, offset in made)

    return encode


def child(name: str, data: Path, model: Path, cache: Path) -> None:
    """One contender: prints what it counted and how long it took."""
    warnings.simplefilter("ignore")
    encode = {
        "ours": lambda: ours(data, model, workers=1),
        "ours-workers": lambda: ours(data, model),
        "ours-cached": lambda: ours(data, model, cache=cache),
        "tamm": lambda: tamm(data, model),
        "mlx-lm": lambda: mlx_lm(data, model, False),
        "mlx-lm-ours": lambda: mlx_lm(data, model, True),
    }[name]()
    if name == "ours-cached":
        encode()
    started, cpu_started = time.perf_counter(), processor_seconds()
    counts = encode()
    seconds, cpu_seconds = time.perf_counter() - started, processor_seconds() - cpu_started
    print(json.dumps({"counts": counts, "seconds": seconds, "cpu_seconds": cpu_seconds}))


def processor_seconds() -> float:
    """Of this process and of those it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(data: Path, model: Path, cache: Path, repeat: int) -> Found:
    """Contender -> of each turn what it told, and what was seen from outside."""
    found: Found = {}
    names, counts = [*OURS, *OTHERS], set()
    read_once(data)
    for turn in range(repeat):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seen = run([sys.executable, __file__, "--child", name, "--data", data, "--model", model, "--cache", cache])
            told = json.loads(seen.output.splitlines()[-1])
            counts.add(tuple(told["counts"]))
            found.setdefault(name, []).append((told, seen))
            print(f"turn {turn + 1} {name}: {told['seconds']:.2f} s", file=sys.stderr)
    if len(counts) != 1:
        raise SystemExit(f"the contenders made different tokens or targets: {sorted(counts)}")
    return found


def write_demo_model(folder: Path) -> Path:
    from mlx_afm.workflows.convert import convert
    from mlx_afm.workflows.demo import write_toolkit_folder

    return convert(write_toolkit_folder(folder / "toolkit"), folder / "model").folder


def write_bpe_model(folder: Path, data: Path) -> Path:
    """The tokenizer's part of a model folder, which is all that is needed here."""
    import sentencepiece

    from mlx_afm.text.hf_tokenizer import write_hf_tokenizer
    from mlx_afm.text.template import EXECUTABLE_END, EXECUTABLE_START, NEWLINE, TURN_END, TURN_START

    with data.open(encoding="utf-8") as lines:
        texts = [message["content"] for line in lines for message in json.loads(line)]
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\n", " ") for text in texts),
        model_prefix=str(folder / "trained"),
        model_type="bpe",
        vocab_size=BPE_PIECES,
        user_defined_symbols=[TURN_START, TURN_END, NEWLINE, EXECUTABLE_START, EXECUTABLE_END],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        split_digits=True,
        pad_id=0,
        unk_id=1,
        eos_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    write_hf_tokenizer(folder / "trained.model", folder)
    (folder / "config.json").write_text('{"model_type": "afm7"}')
    return folder


def report(found: Found, examples: int, prefix: str) -> dict[str, dict[str, float]]:
    seconds = {name: statistics.median(told["seconds"] for told, _ in turns) for name, turns in found.items()}
    cpu = {name: statistics.median(told["cpu_seconds"] for told, _ in turns) for name, turns in found.items()}
    memory = {name: max(seen.peak_anonymous_bytes for _, seen in turns) for name, turns in found.items()}
    cases: dict[str, dict[str, float]] = {}
    print(f"{'':14}{'seconds':>9}{'CPU seconds':>13}{'examples/s':>12}{'anonymous MB':>14}")
    for name in (*OURS, *OTHERS):
        rate = examples / seconds[name]
        print(f"{name:14}{seconds[name]:9.2f}{cpu[name]:13.2f}{rate:12,.0f}{memory[name] / 1e6:14.0f}")
        facts = {"seconds": seconds[name], "cpu_seconds": cpu[name], "examples_per_second": rate}
        cases[prefix + name] = {**facts, "anonymous_bytes": memory[name]}
    for mine in OURS:
        for other in OTHERS:
            ratios = {"time_ratio": seconds[mine] / seconds[other], "cpu_time_ratio": cpu[mine] / cpu[other]}
            if mine != "ours-workers":  # what its processes use is not seen
                ratios["memory_ratio"] = memory[mine] / memory[other]
            cases[f"{prefix}{mine}/{other}"] = ratios
            faster, less = 1 / ratios["time_ratio"], 1 / ratios["cpu_time_ratio"]
            print(f"{prefix}{mine} against {other}: {faster:.1f} times as fast, {less:.1f} in processor time")
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.data, options.model, options.cache)
        return
    with options.data.open("rb") as lines:
        examples = sum(1 for _ in lines)
    cases: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {"": options.model} if options.model else {}
        models = models or {"": write_demo_model(folder), "bpe ": write_bpe_model(folder / "bpe", options.data)}
        for prefix, model in models.items():
            found = measure(options.data, model, folder / "cache", options.repeat)
            cases |= report(found, examples, prefix)
    facts = {"data": options.data.name, "examples": examples, "repeat": options.repeat}
    result = {"cases": cases, **facts, **described("mlx-afm", "sentencepiece", "tamm", "mlx-lm")}
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
