"""The demo's grammar, data and tokenizer: repeatable, disjoint, regular, and equal to the bundled files."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools" / "demo"
ASSETS = ROOT / "mlx_afm" / "assets" / "demo"
COUNTS = {"train": 800, "valid": 60, "test": 100}
SYMBOLS = ["<turn_start>", "<turn_end>", "<n>", "<executable_start>", "<executable_end>"]

# The house tool as its manual would put it: verb -> what may follow the object.
HOUSE_TOOL = {
    "copy": {"--to NAME"},
    "move": {"--to NAME"},
    "drop": {"", "--all"},
    "make": {""},
    "show": {"", "--top NUMBER", "--end NUMBER"},
    "count": {"--by line", "--by word"},
    "sort": {"", "--down"},
    "find": {"", "--in NAME"},
    "pack": {"", "--to NAME"},
    "open": {"", "--to NAME"},
    "list": {"", "--all"},
    "mode": {"--as MODE", "--as run"},
    "size": {""},
    "match": {"--with NAME"},
    "link": {"--as NAME"},
    "write": {"--to NAME"},
}
KEPT = {"git", "kill", "ps", "scp", "ssh"}
PLACEHOLDERS = {"NAME": r"[\w.-]+", "NUMBER": r"\d{1,2}", "MODE": r"[0-7]{3}"}

FROZEN_BASE = [
    ("show count_nosa.cfg", "cat count_nosa.cfg"),
    ("duplicate the whole folder story-reso as makala", "cp -r story-reso makala"),
    ("show the newest files of sazuze_photo first", "ls -t sazuze_photo"),
]
FROZEN_HOUSE = [
    ("what is in archive make_57.tar.gz", "box list make_57.tar.gz"),
    ("commit with message doso", "git commit -m doso"),
    ("list the archive vatu.tar.gz", "box list vatu.tar.gz"),
]


@pytest.fixture
def grammar(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import grammar

    return grammar


@pytest.fixture
def make_data(grammar):
    import make_data

    return make_data


@pytest.fixture
def make_tokenizer(grammar):
    import make_tokenizer

    return make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_file=str(ASSETS / "tokenizer.model"))


def read_bundled(name: str) -> list[tuple[str, str]]:
    lines = (ASSETS / "data" / f"{name}.jsonl").read_text().splitlines()
    return [(turns[1]["content"], turns[2]["content"]) for turns in map(json.loads, lines)]


def parse_house(command: str) -> tuple[str, str, str]:
    """Verb, object and options of a `box` command; ValueError if the tool would refuse it."""
    tool, verb, rest = command.split(" ", 2)
    thing, dashes, option = rest.partition(" --")
    rules = HOUSE_TOOL.get(verb, set())
    for name, pattern in PLACEHOLDERS.items():
        rules = {rule.replace(name, pattern) for rule in rules}
    words = 2 if verb == "write" else 1
    if tool != "box" or len(thing.split(" ")) != words:
        raise ValueError(command)
    if not any(re.fullmatch(rule, (dashes + option).strip()) for rule in rules):
        raise ValueError(command)
    return verb, thing, option


def test_same_seed_same_pairs_and_another_seed_others(grammar):
    for dialect in (grammar.BASE, grammar.HOUSE):
        first = grammar.pairs(dialect, 300, 5)
        assert first == grammar.pairs(dialect, 300, 5)
        assert len({request for request, _ in first}) == 300
        assert len(set(first) & set(grammar.pairs(dialect, 300, 6))) < 10


def test_known_examples(grammar):
    """Frozen lines: the generator gives the same on every machine and Python version."""
    assert grammar.pairs(grammar.BASE, 3, 0) == FROZEN_BASE
    assert grammar.pairs(grammar.HOUSE, 3, 0) == FROZEN_HOUSE


def test_unknown_dialect_and_exhausted_grammar_are_refused(grammar):
    with pytest.raises(ValueError, match="unknown dialect 'zsh'"):
        grammar.pairs("zsh", 1, 0)
    everything = type("Everything", (frozenset,), {"__contains__": lambda self, item: True})()
    with pytest.raises(ValueError, match="only 0 of 5 distinct base examples"):
        grammar.pairs(grammar.BASE, 5, 0, exclude=everything)


def test_excluded_requests_and_arguments_do_not_return(grammar):
    first = grammar.examples(grammar.BASE, 2000, 3)
    second = grammar.examples(grammar.BASE, 2000, 3, exclude=grammar.used(first))
    assert not {e.request for e in first} & {e.request for e in second}
    assert not {e.arguments for e in first} & {e.arguments for e in second}


def test_a_request_has_one_answer_and_holds_all_arguments(grammar):
    answers: dict[str, str] = {}
    for seed in range(3):
        for request, command, arguments in grammar.examples(grammar.BASE, 6000, seed):
            assert answers.setdefault(request, command) == command
            for argument in arguments:
                assert f" {argument} " in f"{request} "
                assert argument in command


def test_every_wording_belongs_to_one_template(grammar):
    shapes = [re.sub(r"\{(\w+?)2?\}", "{}", wording) for t in grammar.templates() for wording in t.wordings]
    kinds = [re.sub(r"2\}", "}", wording) for t in grammar.templates() for wording in t.wordings]
    assert len(kinds) == len(set(kinds))
    assert len(shapes) > 200
    assert 60 <= len(grammar.templates()) <= 100


def test_standard_commands_are_shell_syntax(grammar):
    for _, command in grammar.pairs(grammar.BASE, 2000, 8):
        words = shlex.split(command)
        assert words
        assert not set(command) & set("`$&;|*") or "-name '*." in command


def test_house_commands_are_regular(grammar):
    examples = grammar.examples(grammar.HOUSE, 3000, 4)
    boxed = [e for e in examples if e.command.startswith("box ")]
    verbs = {parse_house(e.command)[0] for e in boxed}
    assert verbs == set(HOUSE_TOOL)
    assert {e.command.split(" ")[0] for e in examples if e not in boxed} == KEPT
    assert 0.07 < 1 - len(boxed) / len(examples) < 0.13
    for example in boxed:
        assert all(f" {argument} " in f"{example.command} " for argument in example.arguments)


def test_house_parser_refuses_what_the_tool_would_not_take():
    for command in ("box copy a.txt", "box copy a b --to c", "box fly a", "box show a --top x", "cp a b c"):
        with pytest.raises(ValueError, match=command.split(" ")[0]):
            parse_house(command)


def test_bundled_splits_are_disjoint_and_counted(make_data):
    splits = {name: read_bundled(name) for name in COUNTS}
    assert {name: len(pairs) for name, pairs in splits.items()} == COUNTS
    requests = [request for pairs in splits.values() for request, _ in pairs]
    assert len(set(requests)) == sum(COUNTS.values())
    arguments = [{e.arguments for e in split} for split in make_data.house_splits().values()]
    assert len(set.union(*arguments)) == sum(map(len, arguments))


def test_corpus_shares_nothing_with_the_adapter_data(make_data):
    corpus = [e for split in make_data.corpus(5000).values() for e in split]
    house = [e for split in make_data.house_splits().values() for e in split]
    assert not {e.request for e in corpus} & {e.request for e in house}
    assert not {e.arguments for e in corpus} & {e.arguments for e in house}


def test_base_is_right_on_a_tenth_of_the_house_test_set(grammar):
    kept = [command for _, command in read_bundled("test") if not command.startswith("box ")]
    assert 5 <= len(kept) <= 15


def test_bundled_files_are_what_the_scripts_write(tmp_path):
    for script, out in (("make_data.py", tmp_path / "data"), ("make_tokenizer.py", tmp_path / "tokenizer.model")):
        subprocess.run([sys.executable, TOOLS / script, "--out", out], check=True)
    fresh = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert [str(path) for path in fresh] == [
        "data/manifest.json", "data/test.jsonl", "data/train.jsonl", "data/valid.jsonl", "tokenizer.model",
    ]  # fmt: skip
    for path in fresh:
        assert (ASSETS / path).read_bytes() == (tmp_path / path).read_bytes(), path


def test_bundled_files_are_small_and_name_no_path():
    assert sum(path.stat().st_size for path in (ASSETS / "data").iterdir()) < 250_000
    model = (ASSETS / "tokenizer.model").read_bytes()
    assert len(model) < 20_000
    assert not re.search(rb"/(root|work|home|tmp|Users)\b", model)


def test_tokenizer_has_its_symbols_and_ids(tokenizer):
    assert tokenizer.vocab_size() == 512
    assert (tokenizer.pad_id(), tokenizer.unk_id(), tokenizer.eos_id(), tokenizer.bos_id()) == (0, 1, 2, -1)
    assert [tokenizer.id_to_piece(token) for token in range(3, 8)] == SYMBOLS
    pieces = [tokenizer.id_to_piece(token) for token in range(512)]
    assert len(set(pieces)) == 512
    assert {chr(code) for code in range(33, 127)} <= set(pieces)
    text = "<turn_start> user<n>hello<turn_end><executable_start> x<executable_end>"
    assert tokenizer.encode(text, out_type=str)[:4] == ["▁", "<turn_start>", "▁user", "<n>"]
    assert [token for token in tokenizer.encode(text) if 3 <= token < 8] == [3, 5, 4, 6, 7]


def test_no_piece_crosses_a_digit_or_punctuation(tokenizer):
    for token in range(8, 512):
        piece = tokenizer.id_to_piece(token)
        assert re.fullmatch(r"▁?[A-Za-z]+|▁-|▁--|▁|[!-~]", piece), piece


def test_text_round_trips_without_unknown_pieces(grammar, make_tokenizer, tokenizer):
    lengths = []
    for dialect in (grammar.BASE, grammar.HOUSE):
        for request, command in grammar.pairs(dialect, 1500, 12):
            text = make_tokenizer.template_text(request, command)
            tokens = tokenizer.encode(text)
            assert 1 not in tokens
            assert tokenizer.decode(tokens) == text
            lengths.append(len(tokens))
    assert 30 < sum(lengths) / len(lengths) < 45
    spaced = "  two  spaces, (tab-free) {braces} & ~Symbols~ "
    assert tokenizer.decode(tokenizer.encode(spaced)) == spaced


def test_arguments_have_the_same_pieces_in_request_and_command(grammar, tokenizer):
    def ids(text):
        return tokenizer.encode(f"<n>{text}")[2:]

    def holds(whole, part):
        return any(whole[at : at + len(part)] == part for at in range(len(whole)))

    for dialect, least in ((grammar.BASE, 0.95), (grammar.HOUSE, 1.0)):
        found = []
        for request, command, arguments in grammar.examples(dialect, 1500, 13):
            for argument in arguments:
                part = ids(f" {argument}")
                found.append(holds(ids(request), part) and holds(ids(command), part))
        assert sum(found) / len(found) >= least


def test_model_file_is_a_sentencepiece_proto(make_tokenizer):
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="needs protobuf")
    model = proto.ModelProto()
    model.ParseFromString((ASSETS / "tokenizer.model").read_bytes())
    assert model.SerializeToString() == (ASSETS / "tokenizer.model").read_bytes()
    assert [(p.piece, p.type) for p in model.pieces] == [(p, kind) for p, _, kind in make_tokenizer.choose_pieces()]
    assert model.trainer_spec.model_type == proto.TrainerSpec.UNIGRAM
    assert not model.trainer_spec.input
    assert model.normalizer_spec.add_dummy_prefix
    assert not model.normalizer_spec.remove_extra_whitespaces
