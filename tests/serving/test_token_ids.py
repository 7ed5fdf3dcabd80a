"""Token ids outside the vocabulary are refused wherever they come in: they would read other memory, or crash."""

import json

import mlx.core as mx
import numpy as np
import pytest

import mlx_afm
from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.formats.safetensors_file import read_metadata, read_safetensors, write_safetensors
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.generation import Engine, Request, TextStream
from mlx_afm.generation.forms import decoder_of
from serving_client import parse_reply, request_bytes, send
from tiny import tiny_model

BAD = [(512, 1), (10**6, 0), (-1, 2), (True, 1), (2.0, 1)]


@pytest.fixture(scope="module")
def loaded(model_folder):
    return mlx_afm.load(model_folder)


def spoiled(token, place):
    ids = [2, 3, 12, 5]
    ids[place] = token
    return ids


def says(token, place, where="prompt"):
    return rf"{where}, token {place}: token id outside the vocabulary .*0 to 511 .*512 tokens.*found {token}"


@pytest.mark.parametrize(("token", "place"), BAD)
def test_prompts_of_ids(loaded, token, place):
    ids = spoiled(token, place)
    with pytest.raises(ConfigError, match=says(token, place)):
        mlx_afm.generate(*loaded, ids, max_tokens=2)
    with pytest.raises(ConfigError, match=says(token, place)):
        next(mlx_afm.stream_generate(*loaded, ids, max_tokens=2))
    with pytest.raises(ConfigError, match=says(token, place, "prompts, prompt 1")):
        mlx_afm.batch_generate(*loaded, ["hi", ids], max_tokens=2)
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        Engine(decoder_of(loaded[0]).decoder).add(Request(ids=ids))


def test_arrays_of_ids(loaded):
    wanted = mlx_afm.generate(*loaded, [2, 3, 12, 5], max_tokens=3)
    assert mlx_afm.generate(*loaded, np.array([2, 3, 12, 5]), max_tokens=3) == wanted
    assert mlx_afm.generate(*loaded, mx.array([2, 3, 12, 5]), max_tokens=3) == wanted
    with pytest.raises(ConfigError, match=says(600, 1)):
        mlx_afm.generate(*loaded, mx.array([2, 600]), max_tokens=3)


def test_rows_without_a_piece_are_tokens_that_have_no_text(loaded):
    _, tokenizer = loaded
    model = tiny_model(vocab_size=tokenizer.vocab_size + 8, num_layers=2, num_kv_reuse_layers=1)
    last = tokenizer.vocab_size + 7

    def always(history, logits):
        return mx.where(mx.arange(logits.shape[-1]) == last, 1e9, logits)

    assert mlx_afm.generate(model, tokenizer, [2, last], max_tokens=2, logits_processors=[always]) == ""
    assert mlx_afm.batch_generate(model, tokenizer, [[2, last]], max_tokens=2)
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        mlx_afm.generate(model, tokenizer, [2, last + 1], max_tokens=2)
    assert TextStream(tokenizer).add(last).text == ""


def test_a_text_whose_ids_the_model_does_not_have(loaded):
    small = tiny_model(vocab_size=61, num_layers=2, num_kv_reuse_layers=1)
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        mlx_afm.generate(small, loaded[1], "list the files", max_tokens=2)


def test_a_folder_whose_tokenizer_is_another_models(model_folder, tmp_path):
    from mlx.utils import tree_flatten

    from mlx_afm.checkpoints.arrays import from_mlx
    from mlx_afm.checkpoints.mlx_checkpoint import write_config
    from mlx_afm.formats.mlx_folder import write_shards

    small = tiny_model(vocab_size=61, num_layers=2, num_kv_reuse_layers=1)
    folder = tmp_path / "small"
    folder.mkdir()
    write_shards(folder, {name: from_mlx(array) for name, array in tree_flatten(small.parameters())})
    write_config(folder, small.args, {})
    (folder / "tokenizer.model").write_bytes((model_folder / "tokenizer.model").read_bytes())
    with pytest.raises(ConfigError, match=r"tokenizer.model: the tokenizer is another model's .*61.*512"):
        mlx_afm.load(folder)


@pytest.mark.parametrize(("token", "place"), BAD[:3])
def test_a_prompt_cache_from_a_file(loaded, model_folder, tmp_path, token, place):
    from mlx_afm.generation.prompt_cache import prompt_cache_file

    file = tmp_path / "c.safetensors"
    with prompt_cache_file(file, loaded[0]) as prefixes:
        mlx_afm.generate(*loaded, "hi", max_tokens=1, prefix_cache=prefixes)
    tensors, metadata = dict(read_safetensors(file)), read_metadata(file)
    ids = np.array(tensors["ids"].read_values())
    ids[place] = token
    other = tmp_path / "d.safetensors"
    write_safetensors(other, {**tensors, "ids": LazyTensor.of(ids)}, metadata=metadata)
    says_where = rf"d.safetensors: ids, token {place}: token id outside the vocabulary"
    with pytest.raises(FormatError, match=says_where), prompt_cache_file(other, loaded[0]):
        pass


@pytest.mark.parametrize(("token", "place"), BAD[:3])
def test_ids_over_http(server, token, place):
    def refusal(path, **value):
        body = json.dumps({"model": "base", "max_tokens": 2, **value}).encode()
        reply = parse_reply(send(server.url, request_bytes("POST", path, body)))
        assert reply.status == 400
        return reply.error

    ids, bad = spoiled(token, place), f"token {place}: token id outside the vocabulary"
    for prompt, where in ((ids, "prompt"), ([[2, 3], ids], "prompt 1")):
        error = refusal("/v1/completions", prompt=prompt)
        assert error["param"] == "prompt"
        assert f"{where}, {bad}" in error["message"]
        assert "512 tokens" in error["message"]
        assert str(token) in error["message"]
    bias = {str(token if number == place else number + 3): 1 for number in range(3)}
    error = refusal("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], logit_bias=bias)
    assert error["param"] == "logit_bias"
    assert f"logit_bias: keys, {bad}" in error["message"]


def test_a_string_is_one_prompt(loaded):
    ids = mlx_afm.generation.to_prompt_ids(loaded[1], "hi")
    for prompt in ("hi", [{"role": "user", "content": "hi"}], ids, mx.array(ids)):
        (answer,) = mlx_afm.batch_generate(*loaded, prompt, max_tokens=4)
        assert answer.text == mlx_afm.generate(*loaded, "hi", max_tokens=4)
    assert mlx_afm.batch_generate(*loaded, [], max_tokens=4) == []
