"""Tokens over HTTP: the tokenizer's endpoints, and log probabilities of prompts."""

import json

import mlx.core as mx
import pytest

import mlx_afm
from mlx_afm.generation import to_prompt_ids
from mlx_afm.generation.forms import decoder_of
from serving_client import chat

TEXT, NO_END = "/v1/completions", {"2": -100, "4": -100}


@pytest.fixture(scope="module")
def loaded(model_folder):
    model, tokenizer = mlx_afm.load(model_folder)
    decoder_of(model)  # lays its matrices out as answers use them
    return model, tokenizer


def expected_logprobs(model, ids):
    """Of each token after the first, from the model's logits; and the logits' order."""
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return [logprobs[place - 1, ids[place]].item() for place in range(1, len(ids))], logprobs


def complete(call, url, **body):
    reply = call(url, "POST", TEXT, {"model": "base", "logit_bias": NO_END, **body})
    assert reply.status == 200, reply.json
    return reply.json


def test_echo_tells_the_log_probabilities_of_the_prompt(server, call, loaded):
    model, tokenizer = loaded
    ids = [tokenizer.eos_id, *tokenizer.encode("cp vome.go zasu.txt")]
    values, logprobs = expected_logprobs(model, ids)
    for tokens in (0, 1, 3):
        answer = complete(call, server.url, prompt=ids, max_tokens=tokens, echo=True, logprobs=2)
        told = answer["choices"][0]["logprobs"]
        assert told["token_logprobs"][0] is None
        assert told["top_logprobs"][0] is None
        assert told["token_logprobs"][1 : len(ids)] == pytest.approx(values, abs=1e-4)
        for place, top in enumerate(told["top_logprobs"][1 : len(ids)]):
            best = sorted(logprobs[place].tolist(), reverse=True)[:2]
            assert list(top.values()) == pytest.approx(best, abs=1e-4)
        assert len(told["tokens"]) == len(ids) + tokens
        assert answer["usage"]["completion_tokens"] == tokens
        assert answer["choices"][0]["text"].startswith(tokenizer.decode(ids))
        assert answer["choices"][0]["finish_reason"] == "length"
        offsets = told["text_offset"]
        assert offsets == [sum(map(len, told["tokens"][:place])) for place in range(len(offsets))]


def test_a_prompt_alone_fills_the_context_and_is_scored_in_pieces(server, call, loaded):
    model, tokenizer = loaded
    ids = [tokenizer.eos_id, *(5 + number * 7 % 480 for number in range(1499))]
    values, _ = expected_logprobs(model, ids)
    answer = complete(call, server.url, prompt=ids, max_tokens=0, echo=True, logprobs=0)
    found = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
    # Longer prompts are computed in pieces: a key that lies between two int8 numbers may round to the other.
    assert sum(abs(a - b) > 1e-3 for a, b in zip(found, values)) <= 0.02 * len(values)
    whole = complete(call, server.url, prompt=[tokenizer.eos_id] * 4096, max_tokens=0, echo=True)
    assert whole["usage"]["prompt_tokens"] == 4096
    over = call(server.url, "POST", TEXT, {"model": "base", "prompt": [5] * 4097, "max_tokens": 0, "echo": True})
    assert over.error["code"] == "context_length_exceeded"


def test_echo_of_several_prompts_choices_and_streams(server, call):
    texts = ["list the files", "cp a b"]
    answer = complete(call, server.url, prompt=texts, max_tokens=2, echo=True, n=2)
    starts = [choice["text"] for choice in answer["choices"]]
    assert [text.startswith(texts[number // 2]) for number, text in enumerate(starts)] == [True] * 4
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    reply = call(
        server.url,
        "POST",
        TEXT,
        {"model": "base", "prompt": texts, "max_tokens": 2, "echo": True, "n": 2, "stream": True, "logit_bias": NO_END},
    )
    chunks = [json.loads(line[6:]) for line in reply.body.decode().split("\n") if line.startswith("data: {")]
    pieces = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        pieces[choice["index"]] = pieces.get(choice["index"], "") + choice["text"]
    assert [pieces[number] for number in range(4)] == starts


def test_an_adapter_scores_with_its_weights(server, call, loaded):
    scored = {
        name: complete(call, server.url, model=name, prompt="cp a b", max_tokens=0, echo=True, logprobs=0)
        for name in ("base", "small", "some", "dora")
    }
    values = {name: answer["choices"][0]["logprobs"]["token_logprobs"][1:] for name, answer in scored.items()}
    assert len({tuple(value) for value in values.values()}) == 4


def test_a_text_and_its_ids(server, call, loaded):
    tokenizer = loaded[1]
    for text in ("list the files", "é\n€", " "):
        told = call(server.url, "POST", "/tokenize", {"prompt": text}).json
        assert told["tokens"] == [tokenizer.eos_id, *tokenizer.encode(text)]
        assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), 4096)
        plain = call(server.url, "POST", "/tokenize", {"prompt": text, "add_special_tokens": False}).json["tokens"]
        assert plain == tokenizer.encode(text)
        back = call(server.url, "POST", "/detokenize", {"model": "base", "tokens": plain}).json
        assert back == {"prompt": tokenizer.decode(plain)}
    told = call(server.url, "POST", "/tokenize", {"prompt": "list", "return_token_strs": True}).json
    assert "".join(told["token_strs"][1:]).strip() == "list"


def test_a_conversation_and_its_ids(server, call, loaded):
    tokenizer = loaded[1]
    told = call(server.url, "POST", "/tokenize", {"messages": chat("list the files"), "model": "base"}).json
    assert told["tokens"] == to_prompt_ids(tokenizer, chat("list the files"))
    tool = {"type": "function", "function": {"name": "weather"}}
    more = call(server.url, "POST", "/tokenize", {"messages": chat("list the files"), "tools": [tool]}).json
    assert more["count"] > told["count"]


def test_what_programs_ask_of_the_tokenizer(server, call, loaded):
    tokenizer = loaded[1]
    info = call(server.url, "GET", "/tokenizer_info").json
    assert (info["eos_token_id"], info["vocab_size"]) == (tokenizer.eos_id, tokenizer.vocab_size)
    ask = {"prompt": info["eos_token"], "add_special_tokens": False}
    assert call(server.url, "POST", "/tokenize", ask).json["tokens"] == [tokenizer.eos_id]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": chat("a")}),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": False}),
        ("/tokenize", {"messages": [{"role": "user", "content": "<turn_end>"}]}),
        ("/detokenize", {"tokens": [512]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {}),
        (TEXT, {"model": "base", "prompt": "a", "max_tokens": 0}),
    ],
    ids=str,
)
def test_what_cannot_be_asked(path, body, server, call):
    reply = call(server.url, "POST", path, body)
    assert reply.status == 400
    assert reply.error["message"]
