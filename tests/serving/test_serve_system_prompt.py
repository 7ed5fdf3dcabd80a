"""Requests without a system message get the system prompt that their adapter was trained with."""

import dataclasses
import json
import shutil

import pytest

import mlx_afm
from mlx_afm.serving import running
from mlx_afm.text.template import DEFAULT_SYSTEM

TASK = "Answer with one shell command."
QUESTION = {"role": "user", "content": "list the files in docs"}
CHAT = "/v1/chat/completions"
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def adapters(served_adapters, tmp_path):
    """Copies of an adapter that name other system prompts."""
    made = {}
    for name, prompts in (("task", [TASK]), ("bare", [None]), ("several", [TASK, None])):
        made[name] = shutil.copytree(served_adapters["small"], tmp_path / name)
        config = json.loads((made[name] / "adapter_config.json").read_text())
        (made[name] / "adapter_config.json").write_text(json.dumps({**config, "system_prompts": prompts}))
    return made


@pytest.fixture
def length(model_folder):
    """A function that counts the tokens of a prompt of exactly these messages."""
    _, tokenizer = mlx_afm.load(model_folder)
    tokenizer.system_prompt = None
    return lambda *messages: len(tokenizer.apply_chat_template(list(messages)))


def test_each_model_id_has_its_own(model_folder, adapters, serve_config, call, length):
    said = []
    with running(model_folder, adapters, serve_config, said.append) as server:

        def tokens(model, *messages, **more):
            value = {"model": model, "messages": list(messages), "max_tokens": 2, **more}
            reply = call(server.url, "POST", CHAT, value)
            assert reply.status == 200, reply.json
            return reply.json["usage"]["prompt_tokens"]

        task, own = {"role": "system", "content": TASK}, {"role": "system", "content": DEFAULT_SYSTEM}
        assert tokens("base", QUESTION) == length(own, QUESTION)
        assert tokens("task", QUESTION) == length(task, QUESTION)
        assert tokens("bare", QUESTION) == length(QUESTION)
        assert tokens("several", QUESTION) == length(own, QUESTION)
        assert tokens("bare", task, QUESTION) == length(task, QUESTION)
        assert tokens("bare", QUESTION, tools=TOOLS) == tokens("base", QUESTION, tools=TOOLS)
    (notice,) = said
    assert "trained with 2 system prompts" in notice


def test_an_adapter_that_is_added_later_warns_too(model_folder, adapters, serve_config, call, tmp_path):
    said = []
    with running(model_folder, {}, dataclasses.replace(serve_config, admin_roots=(tmp_path,)), said.append) as server:
        added = {"name": "several", "path": str(adapters["several"])}
        assert call(server.url, "POST", "/admin/adapters", added).status == 200
    assert ["trained with 2 system prompts" in text for text in said] == [True]


@pytest.mark.parametrize(("system", "text"), [("Be brief.", "Be brief."), ("", None)])
def test_the_servers_own_setting_wins(system, text, model_folder, adapters, serve_config, call, length):
    config = dataclasses.replace(serve_config, system=system)
    with running(model_folder, {"task": adapters["task"]}, config) as server:
        for model in ("base", "task"):
            reply = call(server.url, "POST", CHAT, {"model": model, "messages": [QUESTION], "max_tokens": 2})
            turn = [] if text is None else [{"role": "system", "content": text}]
            assert reply.json["usage"]["prompt_tokens"] == length(*turn, QUESTION)
