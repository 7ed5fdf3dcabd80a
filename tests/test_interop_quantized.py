"""mlx-lm driving quantized folders, through both doors: the shim in the folder, and `register`."""

from __future__ import annotations

import json
import subprocess
import sys

import mlx.core as mx
import pytest

import mlx_afm
import tolerances
from mlx_afm.interop import MODULE, SHIM, MlxLmModel
from mlx_afm.model.projections import Quantized
from mlx_afm.quant import QuantConfig

FORMS = {
    "apple": {"recipe": "apple"},
    "balanced": {"mode": "balanced", "predicate": lambda path, shape: True},
    "affine": {"bits": 4},
    "mxfp4": {"mode": "mxfp4"},
    "nvfp4": {"mode": "nvfp4"},
    "mxfp8": {"mode": "mxfp8"},
}
PROMPT = [{"role": "user", "content": "delete the folder old_logs"}]
TOKENS = mx.arange(3, 40)[None]

# transformers says on import that it found no torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module", params=[(form, dtype) for form in FORMS for dtype in ("float32", "bfloat16")], ids=str)
def folder(request, model_folder, tmp_path_factory):
    form, dtype = request.param
    target = tmp_path_factory.mktemp("codes") / "model"
    mlx_afm.convert(model_folder, target, dtype=dtype, quantization=QuantConfig(**FORMS[form]))
    return target


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


def require_ours(model, tokenizer, folder):
    """The model mlx-lm made says what ours says, in the same dtype."""
    import mlx_lm

    ours, our_tokenizer = mlx_afm.load(folder)
    assert any(isinstance(module, Quantized) for module in model.modules())
    assert model(TOKENS).dtype == ours(TOKENS).dtype
    assert mx.array_equal(model(TOKENS), ours(TOKENS))
    ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True)
    theirs = mlx_lm.generate(model, tokenizer, ids, max_tokens=8)
    assert theirs.strip() == mlx_afm.generate(ours, our_tokenizer, PROMPT, max_tokens=8).strip()


def test_through_the_shim(folder):
    import mlx_lm

    with pytest.raises(ValueError, match="trust_remote_code"):
        mlx_lm.load(str(folder))
    model, tokenizer = mlx_lm.load(str(folder), trust_remote_code=True)
    assert isinstance(model, MlxLmModel)
    require_ours(model, tokenizer, folder)


def test_through_register(folder, registered):
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(folder))
    assert isinstance(model, MlxLmModel)
    require_ours(model, tokenizer, folder)


def test_the_shim_is_two_lines_that_import_us(model_folder, tmp_path):
    mlx_afm.convert(model_folder, tmp_path / "q", quantization=QuantConfig(bits=4))
    assert json.loads((tmp_path / "q" / "config.json").read_text())["model_file"] == SHIM
    lines = (tmp_path / "q" / SHIM).read_text().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("from mlx_afm.interop import ") for line in lines)


def test_mlx_lms_command_line(model_folder, tmp_path):
    mlx_afm.convert(model_folder, tmp_path / "q", quantization=QuantConfig(recipe="apple"))
    line = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(tmp_path / "q"), "--trust-remote-code"]
    line += ["--prompt", PROMPT[0]["content"], "-m", "8", "--verbose", "False"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    model, tokenizer = mlx_afm.load(tmp_path / "q")
    assert mlx_afm.generate(model, tokenizer, PROMPT, max_tokens=8).strip() in done.stdout


def test_adapters_on_codes_and_the_kept_adapter_of_a_fused_folder(registered, model_folder, adapter_forms, tmp_path):
    import mlx_lm

    mlx_afm.convert(model_folder, tmp_path / "q", quantization=QuantConfig(bits=4))
    ours, _ = mlx_afm.load(tmp_path / "q", adapter_forms["folder"])
    theirs, _ = mlx_lm.load(str(tmp_path / "q"), adapter_path=str(adapter_forms["folder"]))
    assert mx.array_equal(theirs(TOKENS), ours(TOKENS))
    kept = mlx_afm.fuse(tmp_path / "q", adapter_forms["pt"], tmp_path / "kept").folder
    again, _ = mlx_lm.load(str(kept), adapter_path=str(kept / "base_adapter"))
    assert mx.array_equal(again(TOKENS), ours(TOKENS))
    dense = mlx_afm.fuse(tmp_path / "q", adapter_forms["folder"], tmp_path / "dense", dequantize=True).folder
    merged, _ = mlx_lm.load(str(dense))
    assert mx.abs(merged(TOKENS) - ours(TOKENS)).max().item() <= tolerances.LOGITS_QUANTIZED


def test_batches_of_unequal_prompts(registered, model_folder, tmp_path):
    import mlx_lm

    mlx_afm.convert(model_folder, tmp_path / "q", quantization=QuantConfig(bits=8))
    model, tokenizer = mlx_lm.load(str(tmp_path / "q"))
    texts = ["ls", "copy notes.txt to archive", "how many lines are in data.csv"]
    ids = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True) for text in texts
    ]
    together = mlx_lm.batch_generate(model, tokenizer, ids, max_tokens=8).texts
    assert together == [mlx_lm.generate(model, tokenizer, row, max_tokens=8) for row in ids]
