"""An adapter whose file changes: nothing that was computed with the old one is used with the new one."""

import dataclasses
import shutil

import pytest

from mlx_afm.adapters import LoRAConfig, write_adapter_folder
from mlx_afm.model_folder import ModelFolder
from mlx_afm.serving import running
from serving_client import chat
from tiny import random_adapter

CHAT = "/v1/chat/completions"
SYSTEM = "Answer with one shell command, and say nothing else. " * 4  # long enough to be kept


@pytest.fixture
def ask(call):
    """A function that gives tokens and log probabilities of an answer, and how much of its prompt was known."""

    def run(server, model):
        value = {"model": model, "messages": chat("list the files", SYSTEM), "max_tokens": 6, "logprobs": True}
        reply = call(server.url, "POST", CHAT, value)
        assert reply.status == 200, reply.json
        told = [(one["token"], one["logprob"]) for one in reply.json["choices"][0]["logprobs"]["content"]]
        return told, reply.json["usage"]["prompt_tokens_details"]["cached_tokens"]

    return run


def test_a_reloaded_adapter_does_not_use_the_prompts_of_the_old_one(
    model_folder, serve_config, bytes_in_memory, ask, tmp_path
):
    base = ModelFolder(model_folder).config
    old, new, other = (random_adapter(base, LoRAConfig(rank=4, scale=2.0), seed=seed) for seed in (11, 12, 13))
    for name, adapter in (("poet", old), ("new", new), ("other", other)):
        write_adapter_folder(tmp_path / name, adapter)
    one_at_a_time = dataclasses.replace(serve_config, adapter_bytes=bytes_in_memory(tmp_path / "poet") * 3 // 2)
    adapters = {name: tmp_path / name for name in ("poet", "other")}
    with running(model_folder, {"new": tmp_path / "new"}, serve_config) as server:
        wanted, _ = ask(server, "new")
    with running(model_folder, adapters, one_at_a_time) as server:
        before, _ = ask(server, "poet")
        assert ask(server, "poet") == (before, ask(server, "poet")[1])
        assert ask(server, "poet")[1] > 0, "the beginning of the prompt is kept"
        shutil.rmtree(tmp_path / "poet")
        shutil.copytree(tmp_path / "new", tmp_path / "poet")
        ask(server, "other")  # takes the place of the old one in memory
        after, known = ask(server, "poet")
    assert (after, known) == (wanted, 0)
    assert after != before


def test_the_first_chat_after_a_change_has_the_new_system_prompt(model_folder, serve_config, call, tmp_path):
    base = ModelFolder(model_folder).config
    for name, prompts in (("poet", ("Rhyme.",)), ("new", ("Answer with one shell command, and say nothing else.",))):
        adapter = random_adapter(base, LoRAConfig(rank=4, scale=2.0), seed=11)
        write_adapter_folder(tmp_path / name, dataclasses.replace(adapter, system_prompts=prompts))

    def length(server, model):
        value = {"model": model, "messages": [{"role": "user", "content": "list the files"}], "max_tokens": 1}
        return call(server.url, "POST", CHAT, value).json["usage"]["prompt_tokens"]

    with running(model_folder, {"new": tmp_path / "new"}, serve_config) as server:
        (loaded,) = call(server.url, "GET", "/admin/adapters").json["adapters"]
    one_at_a_time = dataclasses.replace(serve_config, adapter_bytes=loaded["bytes"] * 3 // 2)
    with running(model_folder, {name: tmp_path / name for name in ("poet", "new")}, one_at_a_time) as server:
        before, wanted = length(server, "poet"), length(server, "new")
        shutil.rmtree(tmp_path / "poet")
        shutil.copytree(tmp_path / "new", tmp_path / "poet")
        assert length(server, "poet") == wanted != before


def test_an_adapter_that_is_removed_and_added_under_the_same_name(model_folder, serve_config, ask, call, tmp_path):
    base = ModelFolder(model_folder).config
    config = dataclasses.replace(serve_config, admin_roots=(tmp_path,))
    for name, seed in (("old", 11), ("new", 12)):
        write_adapter_folder(tmp_path / name, random_adapter(base, LoRAConfig(rank=4, scale=2.0), seed=seed))
    with running(model_folder, {}, config) as server:
        answers = []
        for name in ("old", "new"):
            added = call(server.url, "POST", "/admin/adapters", {"name": "poet", "path": str(tmp_path / name)})
            assert added.status == 200
            answers.append(ask(server, "poet"))
            assert call(server.url, "DELETE", "/admin/adapters/poet").status == 200
    with running(model_folder, {"poet": tmp_path / "new"}, config) as server:
        assert answers[1] == ask(server, "poet")
    assert answers[1][1] == 0
