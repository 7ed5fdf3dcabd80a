"""Models with random weights that must call tools do, with arguments by the tools' schemas."""

from __future__ import annotations

import json

import pytest
from text.sentencepiece_models import TRAINED, model_bytes, toy_pieces

from mlx_afm.errors import ConfigError
from mlx_afm.generation import GenerateConfig, stream_generate
from mlx_afm.generation.tool_choice import tool_call_processor
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.text.tool_calls import parse_tool_calls
from tiny import tiny_model

pytest.importorskip("llguidance", reason="needs llguidance")
jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")

CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
CITY |= {"additionalProperties": False}
NESTED = {
    "$defs": {"Size": {"type": "integer", "minimum": 1, "maximum": 40}},
    "properties": {"sizes": {"type": "array", "items": {"$ref": "#/$defs/Size"}, "maxItems": 3}},
    "required": ["sizes"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": CITY, "now": None, 'odd "name"': NESTED}


def tool(name, parameters=None):
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [tool(name, schema) for name, schema in SCHEMAS.items()]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def pair(request, tmp_path_factory):
    return made(TRAINED[request.param](), tmp_path_factory.mktemp(request.param))


def made(tokenizer_bytes, folder):
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes)
    tokenizer = AFMTokenizer.from_file(folder / "tokenizer.model")
    return tiny_model(vocab_size=tokenizer.vocab_size, num_layers=2, num_kv_reuse_layers=1, hidden_dim=16), tokenizer


def answer(pair, tools, seed, **options):
    model, tokenizer = pair
    processor = tool_call_processor(tokenizer, tools, **options)
    config = GenerateConfig(temp=1.0, seed=seed, max_tokens=900)
    responses = list(stream_generate(model, tokenizer, "hello", config, logits_processors=[processor]))
    assert responses[-1].finish_reason == "stop"
    return "".join(response.text for response in responses)


def test_every_answer_is_calls_of_the_tools(pair):
    names, counts = set(), set()
    for seed in range(12):
        content, calls = parse_tool_calls(answer(pair, TOOLS, seed))
        assert content == ""
        for call in calls:
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            jsonschema.validate(arguments, SCHEMAS[name] or {"type": "object", "maxProperties": 0})
            names.add(name)
        counts.add(len(calls))
    assert names == set(SCHEMAS)
    assert min(counts) == 1 < max(counts)


def test_one_call_where_no_more_is_wanted(pair):
    for seed in range(8):
        _, calls = parse_tool_calls(answer(pair, TOOLS[1:2], seed, one_call=True))
        assert [call["function"] for call in calls] == [{"name": "now", "arguments": "{}"}]


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ([], "no tool to call"),
        ([{"type": "function"}], "tools, tool 0: a tool without name"),
        ([tool("a"), tool("b", 3)], "cannot follow this"),
        ([tool("a", {"not": {}})], "tools: an answer cannot be held"),
    ],
)
def test_what_cannot_be_called(tools, says, tmp_path):
    _, tokenizer = made(model_bytes(toy_pieces()), tmp_path)
    with pytest.raises(ConfigError, match=says):
        tool_call_processor(tokenizer, tools)


def test_a_tokenizer_that_cannot_spell_a_call(tmp_path):
    with pytest.raises(ConfigError, match="no token can continue the answer"):
        answer(made(TRAINED["bpe-unk"](), tmp_path), TOOLS, 0)
