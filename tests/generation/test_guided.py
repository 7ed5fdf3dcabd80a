"""Answers of models with random weights that follow a schema all the same."""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from engine_runs import answers, engine_of
from text.sentencepiece_models import MARKS, TRAINED, model_bytes, toy_pieces

from mlx_afm import response_format
from mlx_afm.errors import AFMError, ConfigError, MissingDependencyError
from mlx_afm.generation import GenerateConfig, Request, stream_generate
from mlx_afm.generation.guided import guided_processor
from mlx_afm.generation.schema import in_order, parse_wanted
from mlx_afm.generation.speculation import Speculation
from mlx_afm.text.tokenizer import AFMTokenizer
from tiny import tiny_model

pytest.importorskip("llguidance", reason="needs llguidance")
jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")

PLACE = {
    "type": "object",
    "title": "Place",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"enum": ["small", "large"]},
        "height": {"type": "integer", "minimum": -99, "maximum": 9999},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}
SURPLUS = 3  # rows of the embedding that are no pieces


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    def of(name, data):
        path = tmp_path_factory.mktemp(name) / "tokenizer.model"
        path.write_bytes(data)
        return AFMTokenizer.from_file(path)

    return {name: of(name, build()) for name, build in TRAINED.items()}


@pytest.fixture(scope="module")
def models(tokenizers):
    sizes = {"num_layers": 2, "num_kv_reuse_layers": 1, "hidden_dim": 16}
    return {name: tiny_model(vocab_size=one.vocab_size + SURPLUS, **sizes) for name, one in tokenizers.items()}


def schema_of(rng, depth=0):
    """A schema that bounds what can be said, so that every answer ends."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "format", "pattern"]
    kind = rng.choice(kinds + ["object", "array", "anyOf"] * (depth < 2))
    if kind == "object":
        return object_of(rng, depth + 1)
    if kind == "array":
        return {"type": "array", "items": schema_of(rng, depth + 1), "maxItems": int(rng.integers(0, 3))}
    if kind == "anyOf":
        return {"anyOf": [schema_of(rng, depth + 1) for _ in range(2)]}
    low = int(rng.integers(-500, 500))
    return {
        "string": {"type": "string", "maxLength": int(rng.integers(0, 9))},
        "integer": {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(0, 4000))},
        "number": {"type": "number", "multipleOf": 0.25, "minimum": low, "maximum": low + 3},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "enum": {
            "enum": ["a", 'quote " and \\', "Größe 東", 3, None, "<turn_end>", "two\nlines"][: rng.integers(1, 8)]
        },
        "const": {"const": {"x": [1, "y"]}},
        "format": {"type": "string", "format": str(rng.choice(["date", "time", "uuid"]))},
        "pattern": {"type": "string", "pattern": "^[a-c]{2,4}-\\d{1,3}$"},
    }[kind]


def object_of(rng, depth=0):
    names = [str(name) for name in rng.permutation(["a", "zeta", "b c", "é", "name_2", "Q"])[: rng.integers(1, 5)]]
    required = [name for name in names if rng.random() < 0.6]
    properties = {name: schema_of(rng, depth) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def answer(model, tokenizer, schema, *, seed=0, max_tokens=900, prompt="hello", **options):
    """Text, the last response and the processor of one answer at temperature 1."""
    processor = guided_processor(tokenizer, schema)
    config = GenerateConfig(temp=1.0, seed=seed, max_tokens=max_tokens, **options)
    responses = list(stream_generate(model, tokenizer, prompt, config, logits_processors=[processor]))
    return "".join(response.text for response in responses), responses, processor


def check(text, schema):
    """Valid, written as the model was trained to write it, and in the order of the properties."""
    value = json.loads(text)
    jsonschema.validate(value, schema)
    _check_order(value, schema)
    if "\\" not in text:
        assert json.dumps(value, ensure_ascii=False) == text or "." in text  # 1.50 is a number too


def _check_order(value, schema):
    if isinstance(value, dict) and "properties" in schema:
        assert list(value) == [name for name in schema["properties"] if name in value]
        for name, inner in value.items():
            _check_order(inner, schema["properties"][name])
    if isinstance(value, list) and "items" in schema:
        for inner in value:
            _check_order(inner, schema["items"])


@pytest.mark.parametrize("seed", range(60))
def test_every_answer_follows_its_schema(models, tokenizers, seed):
    name = ("unigram", "bpe")[seed % 2]
    schema = object_of(np.random.default_rng(seed))
    text, responses, processor = answer(models[name], tokenizers[name], schema, seed=seed)
    check(text, schema)
    assert responses[-1].finish_reason == "stop"
    assert responses[-1].token == tokenizers[name].turn_end_id
    assert processor.complete


@pytest.mark.parametrize("name", TRAINED)
def test_whatever_the_tokenizer_is_like(models, tokenizers, name):
    text, responses, _ = answer(models[name], tokenizers[name], response_format(PLACE), seed=3)
    check(text, PLACE)
    marks = {tokenizers[name].convert_tokens_to_ids(mark) for mark in MARKS} | {tokenizers[name].eos_id}
    assert not marks & {response.token for response in responses[:-1]}


def test_the_end_is_allowed_when_the_answer_is_whole_and_not_before(tokenizers):
    tokenizer = tokenizers["bpe"]
    processor = guided_processor(tokenizer, {"type": "regex", "pattern": "ab+"})
    prompt, tokens, zeros = [2, 3], [], mx.zeros((1, tokenizer.vocab_size))

    def allowed():
        row = processor(mx.array(prompt + tokens), zeros)[0]
        return {token for token in range(tokenizer.vocab_size) if row[token].item() == 0}

    a, b, end = (tokenizer.convert_tokens_to_ids(piece) for piece in ("a", "b", "<turn_end>"))
    assert a in allowed()
    assert end not in allowed()
    tokens.append(a)
    assert b in allowed()
    assert end not in allowed()
    assert not processor.complete
    tokens.append(b)
    assert {b, end} <= allowed()
    assert processor.complete
    tokens.append(end)
    assert allowed() == {end}
    del tokens[1:]
    assert end not in allowed()  # it follows an answer that lost its last tokens


def test_a_limit_cuts_and_says_so(models, tokenizers):
    text, responses, processor = answer(models["bpe"], tokenizers["bpe"], PLACE, max_tokens=5)
    assert (responses[-1].finish_reason, len(responses)) == ("length", 5)
    assert not processor.complete
    assert text.startswith('{"')


def test_a_prompt_in_a_batch_of_answers_is_no_part_of_the_answer(models, tokenizers):
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    for prompt in ("{", '{"a": 1}', "one two three"):
        assert answer(models["bpe"], tokenizers["bpe"], schema, prompt=prompt)[0] == '{"a": 1}'


@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_with_a_draft_model(models, tokenizers, temp):
    """Refused proposals are taken back from the schema too; the answer is the plain one."""
    tokenizer, target = tokenizers["bpe"], models["bpe"]
    draft = tiny_model(seed=5, vocab_size=target.args.vocab_size, num_layers=1, num_kv_reuse_layers=0)
    config = GenerateConfig(temp=temp, seed=2, max_tokens=120)

    def request():
        ends = frozenset(tokenizer.eos_token_ids)
        processors = [guided_processor(tokenizer, PLACE)]
        return Request(ids=[2, 3, 4], config=config, logits_processors=processors, stop_token_ids=ends)

    speculation = Speculation(draft=draft, num_draft_tokens=4)
    beside = Request(ids=[5, 6], config=GenerateConfig(max_tokens=40))
    tokens, _ = answers(engine_of(target, speculation=speculation), [request(), beside])
    assert 0 < speculation.accepted < speculation.drafted
    check(tokenizer.decode(tokens[: tokens.index(tokenizer.turn_end_id)]), PLACE)
    assert [tokens] == answers(engine_of(target), [request()])


@pytest.mark.parametrize("name", TRAINED)
def test_the_bytes_of_tokens_are_what_they_decode_to(tokenizers, name):
    tokenizer = tokenizers[name]
    spelled = tokenizer.token_bytes()
    silent = {token for token, text in enumerate(spelled) if text is None}
    marks = {tokenizer.convert_tokens_to_ids(mark) for mark in MARKS if mark != "<n>"}
    assert silent == marks | {tokenizer.pad_id, tokenizer.unk_id, tokenizer.eos_id}
    assert spelled[tokenizer.newline_id] == b"\n"
    assert spelled[tokenizer.convert_tokens_to_ids("▁▁▁▁")] == b"    "
    for token, text in enumerate(spelled):
        if text is not None and not (len(text) == 1 and text[0] >= 0x80):
            assert tokenizer.decode([token]) == text.decode()


def test_the_order_of_properties():
    properties = {name: {"type": "null"} for name in "abc"}
    assert list(in_order({"properties": properties, "x-order": ["c", "a"]})["properties"]) == ["c", "b", "a"]
    assert list(in_order({"properties": properties, "x-order": ["a", "c"]})["properties"]) == ["a", "b", "c"]
    assert list(in_order({"properties": properties, "x-order": ["gone", "b"]})["properties"]) == ["a", "b", "c"]
    inner = {"type": "object", "properties": properties, "x-order": ["c", "b", "a"]}
    outer = {"$defs": {"T": inner}, "anyOf": [inner], "items": inner, "properties": {"p": inner}}
    found = in_order(outer)
    for schema in (found["$defs"]["T"], found["anyOf"][0], found["items"], found["properties"]["p"]):
        assert list(schema["properties"]) == ["c", "b", "a"]
    assert list(properties) == ["a", "b", "c"]


def test_the_order_reaches_the_answer(models, tokenizers):
    schema = {**PLACE, "required": ["name", "size", "height"], "x-order": ["size", "height", "name"]}
    text, _, _ = answer(models["bpe"], tokenizers["bpe"], response_format(schema), seed=1)
    assert list(json.loads(text)) == ["size", "height", "name"]


def test_all_ways_of_saying_it(models, tokenizers):
    pydantic = pytest.importorskip("pydantic", reason="needs pydantic")

    class Flag(pydantic.BaseModel):
        on: bool

    schema = parse_wanted(Flag).text
    assert json.loads(schema)["properties"]["on"]["type"] == "boolean"
    wrapped = {"type": "json_schema", "json_schema": {"name": "Flag", "schema": json.loads(schema)}}
    assert parse_wanted(wrapped) == parse_wanted(json.loads(schema)) == parse_wanted(Flag)
    assert json.loads(parse_wanted({"type": "json_object"}).text) == {"type": "object"}
    text, _, _ = answer(models["bpe"], tokenizers["bpe"], {"type": "regex", "pattern": r"[0-9]{2}:[0-9]{2}"})
    assert len(text) == 5
    assert text[:2].isdigit()
    assert text[2] == ":"


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        (3, r"expected a JSON schema, a response format or a pydantic model, found int"),
        ({"type": "text"}, "type text guides nothing"),
        ({"type": "regex"}, "a regex without pattern"),
        ({"type": "json_schema"}, "a response format without schema"),
        ({"type": "object", "default": {1}}, "the schema is no JSON"),
        ({"type": "flob"}, "cannot be held to this schema .*found Invalid type: flob"),
        ({"not": {"type": "string"}}, r'found Unimplemented keys: \["not"\]'),
        ({"$ref": "#/$defs/x"}, "cannot be held to this schema .*does not exist"),
        ({"type": "regex", "pattern": "a("}, "cannot be held to this schema"),
        (False, "found bool"),
    ],
    ids=str,
)
def test_what_cannot_be_followed(tokenizers, schema, fault):
    with pytest.raises(ConfigError, match=fault):
        guided_processor(tokenizers["bpe"], schema)


def test_pieces_that_cannot_spell_the_schema(tokenizers):
    schema = {"type": "object", "properties": {"🎉": {"type": "null"}}, "required": ["🎉"]}
    tokenizer = tokenizers["unigram-unk"]
    with pytest.raises(ConfigError, match="no token can continue the answer") as error:
        answer(tiny_model(vocab_size=tokenizer.vocab_size), tokenizer, schema)
    assert "found '{\"'" in str(error.value)


def test_tokens_that_were_not_allowed(tokenizers):
    tokenizer = tokenizers["bpe"]
    processor = guided_processor(tokenizer, PLACE)
    logits = mx.zeros((1, tokenizer.vocab_size))
    processor([2], logits)
    with pytest.raises(AFMError, match="token 1: the answer left its schema"):
        processor([2, tokenizer.convert_tokens_to_ids("a")], logits)


def test_without_the_library(tokenizers, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlx-afm\[guided\]'"):
        guided_processor(tokenizers["bpe"], PLACE)


def test_a_hand_made_vocabulary(tmp_path):
    """Every allowed token, spelled out."""
    (tmp_path / "tokenizer.model").write_bytes(model_bytes(toy_pieces()))
    toy = AFMTokenizer.from_file(tmp_path / "tokenizer.model")
    processor = guided_processor(toy, {"type": "regex", "pattern": "hello A| world|\\n"})
    row = processor([2], mx.zeros((1, toy.vocab_size)))[0]
    allowed = {toy.convert_ids_to_tokens(token) for token in range(toy.vocab_size) if row[token].item() == 0}
    assert allowed == {"h", "hel", "▁", "▁world", "<n>"}
