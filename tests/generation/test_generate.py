"""Prompts to text through mlx-lm's loop."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mlx_afm
from mlx_afm.errors import ConfigError, DataError
from mlx_afm.generation import GenerateConfig, to_prompt_ids

REQUEST = [
    {"role": "system", "content": "Answer with one shell command."},
    {"role": "user", "content": "copy vome.go to zasu.txt"},
]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def loaded(model_folder):
    return mlx_afm.load(model_folder)


def test_the_bundled_model_writes_the_command(loaded):
    assert mlx_afm.generate(*loaded, REQUEST).strip() == "cp vome.go zasu.txt"


def test_greedy_equals_the_models_own_argmax(loaded):
    model, tokenizer = loaded
    ids = to_prompt_ids(tokenizer, REQUEST)
    responses = list(mlx_afm.stream_generate(model, tokenizer, ids, max_tokens=12))
    tokens = [response.token for response in responses]
    sequence = list(ids)
    for token in tokens:
        assert mx.argmax(model(mx.array([sequence]))[0, -1]).item() == token
        sequence.append(token)
    assert responses[-1].finish_reason in ("stop", "length")


def test_it_stops_at_the_end_of_the_turn_or_at_the_limit(loaded):
    _, tokenizer = loaded
    *_, last = mlx_afm.stream_generate(*loaded, REQUEST, max_tokens=50)
    assert (last.finish_reason, last.token) == ("stop", tokenizer.turn_end_id)
    *_, last = mlx_afm.stream_generate(*loaded, REQUEST, max_tokens=2)
    assert (last.finish_reason, last.generation_tokens) == ("length", 2)


def test_text_messages_and_ids_are_the_same_prompt(loaded):
    _, tokenizer = loaded
    messages = [{"role": "user", "content": "hello"}]
    assert to_prompt_ids(tokenizer, "hello") == to_prompt_ids(tokenizer, messages)
    ids = to_prompt_ids(tokenizer, messages)
    assert to_prompt_ids(tokenizer, ids) == ids
    assert ids[0] == tokenizer.eos_id
    assert ids[-1] == tokenizer.newline_id


def test_sampling_is_of_the_seed(loaded):
    texts = [mlx_afm.generate(*loaded, REQUEST, temp=1.5, seed=seed, max_tokens=20) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_what_cannot_be_generated_is_refused(loaded):
    model, tokenizer = loaded
    with pytest.raises(ConfigError, match="empty prompt"):
        to_prompt_ids(tokenizer, [])
    with pytest.raises(DataError, match="spells out the special token '<turn_end>'"):
        to_prompt_ids(tokenizer, "a<turn_end>b")
    with pytest.raises(ConfigError, match="no tokenizer"):
        mlx_afm.generate(model, None, "hello")
    with pytest.raises(ConfigError) as error:
        GenerateConfig(max_tokens=0, temp=-1, top_p=0, top_k=-1, min_p=1)
    assert all(name in str(error.value) for name in ("max_tokens", "temp", "top_p", "top_k", "min_p"))
