"""A model that changes adapters, draft models from a folder, and saved conversations."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

import mlx_afm
from mlx_afm.adapters import LoRAConfig, write_adapter_folder
from mlx_afm.data import read_examples
from mlx_afm.errors import AdapterError, AFMError, ConfigError
from mlx_afm.model_folder import ModelFolder
from mlx_afm.workflows.chat import ChatModel, save_chat
from mlx_afm.workflows.draft_model import load_draft
from tiny import random_adapter, tiny_model

IDS = mx.array([[2, 9, 30, 41]])
TALK = [{"role": "user", "content": "say\n“é”"}, {"role": "assistant", "content": "é"}]


def logits(folder, adapter=None):
    return mlx_afm.load(folder, adapter)[0](IDS)


@pytest.fixture
def whole(model_folder, tmp_path):
    """An adapter that is a fine-tuned model."""
    adapter = random_adapter(ModelFolder(model_folder).config, LoRAConfig(fine_tune_type="full"))
    write_adapter_folder(tmp_path / "whole", adapter)
    return tmp_path / "whole"


def test_adapters_take_turns(model_folder, adapter_forms, whole):
    source = ChatModel(model_folder, {"box": adapter_forms["folder"], "whole": whole})
    for name in ("box", "box", None, "whole", "box", "whole", None, str(adapter_forms["pt"])):
        path = source.adapters.get(name, name)
        assert mx.array_equal(source.use(name)(IDS), logits(model_folder, path)), name
        assert source.active == name
    begun = ChatModel(model_folder, adapter_path=whole)
    assert begun.active == str(whole)
    assert mx.array_equal(begun.use(None)(IDS), logits(model_folder))


def test_a_wrong_adapter_changes_nothing(model_folder, adapter_forms, other_adapter, tmp_path):
    source = ChatModel(model_folder, {"box": adapter_forms["folder"]})
    before = source.use("box")(IDS)
    (tmp_path / "none").mkdir()
    for name in (str(other_adapter), str(tmp_path / "none"), "nobody"):
        with pytest.raises(AFMError):
            source.use(name)
        assert source.active == "box"
        assert mx.array_equal(source.model(IDS), before)
    with pytest.raises(ConfigError, match=r"nobody: no such adapter .expected a path, or a name .box"):
        source.use("nobody")
    with pytest.raises(AdapterError):
        ChatModel(model_folder, adapter_path=other_adapter)


def test_a_loaded_adapter_has_no_dropout(model_folder, tmp_path):
    """Dropout is for training: an adapter that was trained with it answers the same each time."""
    write_adapter_folder(tmp_path / "a", random_adapter(ModelFolder(model_folder).config, LoRAConfig(dropout=0.5)))
    model, _ = mlx_afm.load(model_folder, tmp_path / "a")
    assert mx.array_equal(model(IDS), model(IDS))


def test_a_draft_model_from_a_folder(model_folder):
    model, tokenizer = mlx_afm.load(model_folder)
    speculation = load_draft(model_folder, model, tokenizer, 3)
    assert speculation.num_draft_tokens == 3
    assert mx.array_equal(speculation.draft(IDS), model(IDS))
    with pytest.raises(ConfigError, match="the draft model has another vocabulary"):
        load_draft(model_folder, tiny_model(), None)


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.json"])
def test_a_saved_chat_is_training_data(name, tmp_path):
    talk = [{"role": "system", "content": "Be brief."}, *TALK]
    save_chat(tmp_path / name, talk)
    (example,) = read_examples((tmp_path / name,), ())
    assert [(message.role, message.content) for message in example.messages] == [
        (message["role"], message["content"]) for message in talk
    ]
    assert json.loads((tmp_path / name).read_bytes())  # JSON as a whole too


def test_saving_never_replaces_what_it_did_not_write(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="there is a file"):
        save_chat(path, TALK)
    assert path.read_text() == "mine"
    save_chat(path, TALK, overwrite=True)
    for wrong, what in ((tmp_path, "ending|name"), (tmp_path / "talk.txt", "jsonl or .json at its end")):
        with pytest.raises(ConfigError, match=what):
            save_chat(wrong, TALK)
    with pytest.raises(ConfigError, match="nothing was answered yet"):
        save_chat(tmp_path / "new.jsonl", TALK[:1])
    assert not (tmp_path / "new.jsonl").exists()
