"""One prompt to text."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlx_afm
import tolerances
from mlx_afm.errors import ConfigError, DataError
from mlx_afm.generation import GenerateConfig, to_prompt_ids
from mlx_afm.generation.sampling import choose_tokens as choose

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


def test_each_token_draws_by_its_own_place(loaded):
    """The first token by place 0, the second by place 1, and so on: no two tokens of an answer share randomness."""
    model, tokenizer = loaded
    ids, config = to_prompt_ids(tokenizer, REQUEST), GenerateConfig(temp=30.0, seed=11, max_tokens=8)
    sequence = list(ids)
    for place, response in enumerate(mlx_afm.stream_generate(model, tokenizer, ids, config)):
        logits = model.next_logits(mx.array([sequence]))
        assert choose(logits, [config], [place]).item() == response.token
        sequence.append(response.token)


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
    texts = [mlx_afm.generate(*loaded, REQUEST, temp=3, seed=seed, max_tokens=20) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("name", ["turn_end_id", "eos_id"])
def test_each_end_token_ends_the_answer_and_has_no_text(loaded, name):
    _, tokenizer = loaded
    end = getattr(tokenizer, name)

    def force(history, logits):
        return mx.where(mx.arange(logits.shape[-1]) == end, 1e9, logits) if history.size > start + 2 else logits

    start = len(to_prompt_ids(tokenizer, REQUEST))
    responses = list(mlx_afm.stream_generate(*loaded, REQUEST, logits_processors=[force], max_tokens=9))
    assert [response.finish_reason for response in responses] == [None, None, None, "stop"]
    assert (responses[-1].token, responses[-1].text) == (end, "")
    assert "".join(response.text for response in responses) == tokenizer.decode([r.token for r in responses[:-1]])


def test_log_probabilities_are_those_of_the_model(loaded):
    model, tokenizer = loaded
    ids = to_prompt_ids(tokenizer, REQUEST)
    for response in mlx_afm.stream_generate(model, tokenizer, ids, max_tokens=4):
        logits = model(mx.array([ids]))[0, -1]
        assert mx.abs(response.logprobs - (logits - mx.logsumexp(logits))).max().item() < tolerances.LOGITS_QUANTIZED
        ids = [*ids, response.token]


def test_sampling_follows_the_probabilities_that_the_settings_leave(loaded):
    """4,000 draws of the first token against the probabilities computed by hand, in float64."""
    logits = mx.array([[2.0, 1.5, 1.0, 0.5, -1.0, -3.0]])
    settings = {"temp": 0.7, "top_p": 0.9, "top_k": 4, "min_p": 0.2}
    draws = np.array([choose(logits, [GenerateConfig(seed=seed, **settings)], [0]).item() for seed in range(4000)])
    weights = np.exp(np.array(logits[0], np.float64))
    weights /= weights.sum()
    order = np.argsort(-weights)
    kept = [token for place, token in enumerate(order) if weights[order[:place]].sum() < 0.9]  # nucleus
    kept = [token for token in kept if weights[token] >= 0.2 * weights.max()][:4]
    expected = np.zeros(6)
    expected[kept] = weights[kept] ** (1 / 0.7)
    expected /= expected.sum()
    found = np.bincount(draws, minlength=6) / len(draws)
    assert set(draws.tolist()) == set(kept)
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / len(draws))


def test_every_token_of_an_answer_is_drawn_anew():
    flat = mx.zeros((1, 50))
    config = GenerateConfig(temp=1, seed=5)
    drawn = [choose(flat, [config], [number]).item() for number in range(40)]
    assert len(set(drawn)) > 20
    assert drawn == [choose(flat, [config], [number]).item() for number in range(40)]


def test_progress_of_the_prompt_is_told(loaded):
    told = []
    ids = to_prompt_ids(loaded[1], REQUEST)
    text = "".join(
        response.text
        for response in mlx_afm.stream_generate(
            *loaded, ids, prefill_step_size=10, max_tokens=20, on_progress=lambda *counts: told.append(counts)
        )
    )
    assert told == [(done, len(ids)) for done in (*range(10, len(ids), 10), len(ids))]
    assert text == mlx_afm.generate(*loaded, ids, max_tokens=20)


def test_the_end_of_the_context_ends_the_answer(loaded):
    ids = to_prompt_ids(loaded[1], REQUEST)
    responses = list(mlx_afm.stream_generate(*loaded, ids, context_tokens=len(ids) + 3, max_tokens=20))
    assert [response.finish_reason for response in responses] == [None, None, "length"]
    (last,) = mlx_afm.stream_generate(*loaded, ids, context_tokens=len(ids) + 1, max_tokens=20)  # one token has room
    assert last.finish_reason == "length"
    with pytest.raises(ConfigError, match=rf"at most {len(ids) - 1} tokens, found {len(ids)} tokens"):
        next(mlx_afm.stream_generate(*loaded, ids, context_tokens=len(ids)))
    with pytest.raises(ConfigError, match=r"expected at most 4095 tokens, found 4096 tokens"):
        next(mlx_afm.stream_generate(*loaded, [5] * 4096))


def test_what_cannot_be_generated_is_refused(loaded):
    model, tokenizer = loaded
    with pytest.raises(ConfigError, match="empty prompt"):
        to_prompt_ids(tokenizer, [])
    with pytest.raises(DataError, match="spells out the special token '<turn_end>'"):
        to_prompt_ids(tokenizer, "a<turn_end>b")
    with pytest.raises(ConfigError, match="no tokenizer"):
        mlx_afm.generate(model, None, "hello")
    with pytest.raises(ConfigError) as error:
        GenerateConfig(max_tokens=0, temp=-1, top_p=0, top_k=-1, min_p=1, stop=("",), prefill_step_size=0, kv_bits=4)
    names = ("max_tokens", "temp", "top_p", "top_k", "min_p", "stop", "prefill_step_size", "kv_bits")
    assert all(f"  {name}: " in str(error.value) for name in names)
    with pytest.raises(ConfigError, match="stop: expected texts"):
        GenerateConfig(stop="word")
    with pytest.raises(ConfigError, match="context_tokens: expected from 2 to 4096"):
        GenerateConfig(context_tokens=5000)


def test_a_response_has_the_fields_of_mlx_lms():
    from dataclasses import fields

    from mlx_lm.generate import GenerationResponse as Theirs

    from mlx_afm.generation import GenerationResponse

    assert [field.name for field in fields(GenerationResponse)] == [field.name for field in fields(Theirs)]
