"""A server with a draft model: the answers of single users, in batches of several adapters."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_afm.errors import ConfigError
from mlx_afm.serving import running
from serving_client import REQUESTS, chat
from tiny import tiny_model

CHAT = "/v1/chat/completions"


def counter(call, url, name):
    text = call(url, "GET", "/metrics").body.decode()
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"mlx_afm_{name}_total "))


@pytest.mark.parametrize("number", [3, None], ids=["fixed", "auto"])
def test_answers_are_those_of_one_user_without_a_draft(
    model_folder, served_adapters, serve_config, alone, call, number
):
    config = dataclasses.replace(serve_config, draft_model=model_folder, num_draft_tokens=number)
    problems = []
    asked = [(name, text) for text in REQUESTS[:3] for name in ("base", *served_adapters)]
    with running(model_folder, served_adapters, config, problems.append) as server:

        def ask(request):
            name, text = request
            value = {"model": name, "messages": chat(text), "max_tokens": 24}
            return call(server.url, "POST", CHAT, value).json["choices"][0]["message"]["content"]

        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(ask, asked))
        drafted, accepted = (counter(call, server.url, f"{kind}draft_tokens") for kind in ("", "accepted_"))
    assert found == [alone(name, text, max_tokens=24) for name, text in asked]
    assert 0 < accepted <= drafted
    assert problems == []


def test_several_answers_constraints_and_stop_strings(model_folder, serve_config, call):
    """Each is what the same server says without a draft: with a number that adapts, sampled answers too."""
    requests = [
        {"messages": chat(REQUESTS[0]), "n": 3, "temperature": 1.5, "seed": 5, "max_tokens": 20},
        {"messages": chat(REQUESTS[1]), "temperature": 1.0, "seed": 1, "frequency_penalty": 0.5, "max_tokens": 20},
        {"messages": chat(REQUESTS[2]), "stop": ["s"], "max_tokens": 20, "logprobs": True, "top_logprobs": 2},
    ]
    answers = []
    for draft in (None, model_folder):
        config = dataclasses.replace(serve_config, draft_model=draft, num_draft_tokens=None)
        with running(model_folder, {}, config) as server, ThreadPoolExecutor(3) as pool:
            replies = pool.map(
                lambda value, url=server.url: call(url, "POST", CHAT, {"model": "base", **value}), requests
            )
            answers.append(
                [[(c["message"]["content"], c["finish_reason"]) for c in reply.json["choices"]] for reply in replies]
            )
    assert answers[0] == answers[1]


def test_a_draft_that_does_not_fit_is_refused_at_the_start(model_folder, serve_config, tmp_path, monkeypatch):

    monkeypatch.setattr("mlx_afm.workflows.draft_model.load", lambda path: (tiny_model(vocab_size=64), None))
    config = dataclasses.replace(serve_config, draft_model=tmp_path)
    with pytest.raises(ConfigError, match="another vocabulary"), running(model_folder, {}, config):
        pass
    with pytest.raises(ConfigError, match="num_draft_tokens: expected at least 1, or None to adapt, found 0"):
        dataclasses.replace(serve_config, num_draft_tokens=0)
