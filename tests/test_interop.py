"""mlx-lm and our folders: stock mlx-lm on dense weights, and mlx-lm driving our model."""

from __future__ import annotations

import sys

import mlx.core as mx
import pytest

import mlx_afm
import tolerances
from mlx_afm.interop import MODULE, MlxLmModel
from mlx_afm.workflows.demo import ASSETS
from tiny import random_tokens, tiny_model

PROMPTS = ["copy notes.txt to archive", "delete the folder old_logs", "how many lines are in data.csv", "ls"]

# transformers says on import that it found no torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Answer with one shell command."}, {"role": "user", "content": text}]


@pytest.fixture
def registered(monkeypatch):
    import mlx_lm.utils

    monkeypatch.setattr(mlx_lm.utils, "load_config", mlx_lm.utils.load_config)  # put back afterwards
    before = sys.modules.get(MODULE)
    mlx_afm.register()
    yield
    sys.modules.pop(MODULE)
    if before is not None:
        sys.modules[MODULE] = before


def test_a_dense_folder_loads_in_stock_mlx_lm_and_says_the_same(model_folder):
    import mlx_lm

    stock, tokenizer = mlx_lm.load(str(model_folder))
    assert type(stock).__module__ == MODULE
    ours, our_tokenizer = mlx_afm.load(model_folder)
    tokens = random_tokens((1, 20), vocab=500)
    assert mx.abs(stock(tokens) - ours(tokens)).max().item() <= tolerances.LOGITS_QUANTIZED
    for text in PROMPTS:
        ids = tokenizer.apply_chat_template(ask(text), add_generation_prompt=True)
        assert list(ids) == our_tokenizer.apply_chat_template(ask(text), add_generation_prompt=True)
        theirs = mlx_lm.generate(stock, tokenizer, ids, max_tokens=30)
        assert theirs.strip() == mlx_afm.generate(ours, our_tokenizer, ask(text), max_tokens=30).strip()


def test_mlx_lm_loads_our_adapter_onto_our_model(registered, model_folder, adapter_forms):
    """Its own afm7 rejects the adapters that it trains itself."""
    import mlx_lm

    model, _ = mlx_lm.load(str(model_folder), adapter_path=str(adapter_forms["folder"]))
    assert isinstance(model, MlxLmModel)
    ours, _ = mlx_afm.load(model_folder, adapter_forms["folder"])
    plain, _ = mlx_afm.load(model_folder)
    tokens = random_tokens((2, 12), vocab=500)
    assert mx.array_equal(model(tokens), ours(tokens))
    assert not mx.allclose(ours(tokens), plain(tokens))


def test_mlx_lms_batch_generator_says_what_single_prompts_say(registered, model_folder):
    """Its own afm7 gives other text for the padded rows."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(model_folder))
    ids = [tokenizer.apply_chat_template(ask(text), add_generation_prompt=True) for text in PROMPTS]
    together = mlx_lm.batch_generate(model, tokenizer, ids, max_tokens=30).texts
    alone = [mlx_lm.generate(model, tokenizer, row, max_tokens=30) for row in ids]
    assert together == alone


def test_the_model_file_shim_builds_our_model():
    from mlx_afm.model import Model, ModelArgs

    values = {**tiny_model().args.to_dict(), "something_else": 1}
    assert Model(ModelArgs.from_dict(values)).model_type == "afm7"
    assert (ASSETS / "base-model-config.json").is_file()
