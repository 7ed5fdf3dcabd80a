"""Whatever is printed, sent or written as JSON is strict: no NaN and no infinity, which JSON does not have."""

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
from serving.serving_client import chat, parse_reply, request_bytes, send

from mlx_afm.adapters import Adapter, read_adapter, write_adapter_folder
from mlx_afm.files import to_json, write_json
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.serving import ServeConfig, running
from mlx_afm.text.tool_calls import parse_tool_calls

ROOT = Path(__file__).parents[1]
# Modules that call `json.dumps` themselves, and why that is strict.
OWN = {
    "mlx_afm/files.py": "to_json itself",
    "mlx_afm/data/convert.py": "records that were read as strict JSON",
    "mlx_afm/data/data_format_writer.py": "records that were read as strict JSON",
    "mlx_afm/data/read.py": "a digest",
    "mlx_afm/data/rows.py": "rows of tables, which are read again as strict JSON",
    "mlx_afm/formats/safetensors_file.py": "a header of names, shapes and offsets",
    "mlx_afm/formats/asset_pack.py": "a fault, shown",
    "mlx_afm/generation/jsonl.py": "a digest",
    "mlx_afm/generation/tool_choice.py": "a schema that was read from strict JSON",
    "mlx_afm/serving/api_error.py": "a fault, shown",
    "mlx_afm/text/hf_chat_template.py": "texts",
    "mlx_afm/text/messages.py": "a fault, shown",
    "mlx_afm/training/distributed.py": "a digest",
    "mlx_afm/workflows/answer.py": "a digest",
    "mlx_afm/runs/lineage.py": "a digest",
    "mlx_afm/runs/folder.py": "a copy",
    "mlx_afm/runs/state.py": "the state of a run, which only a run reads",
}


def strict(text):
    """The value of strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def loose_calls(file):
    """Lines that call `json.dumps` or `json.dump` without `allow_nan=False`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        called = node.func if isinstance(node, ast.Call) else None
        dumps = isinstance(called, ast.Attribute) and ast.unparse(called) in ("json.dumps", "json.dump")
        if dumps and not any(word.arg == "allow_nan" for word in node.keywords):
            yield node.lineno


def test_one_place_writes_json():
    files = [*(ROOT / "mlx_afm").rglob("*.py"), *(ROOT / "cli").glob("*.py")]
    found = {str(file.relative_to(ROOT)): lines for file in files if (lines := list(loose_calls(file)))}
    assert not {name: lines for name, lines in found.items() if name not in OWN}, "use mlx_afm.files.to_json"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_numbers_that_are_not_finite_become_null(value, tmp_path):
    assert strict(to_json({"a": [value, 1.5, (value,)], "b": {"c": value}})) == {
        "a": [None, 1.5, [None]],
        "b": {"c": None},
    }
    write_json(tmp_path / "x.json", {"loss": value})
    assert strict((tmp_path / "x.json").read_text()) == {"loss": None}


def test_a_value_within_itself_is_an_error_still():
    value = []
    value.append(value)
    with pytest.raises((ValueError, RecursionError)):
        to_json(value)


def test_numbers_that_overflow_in_a_tool_call_are_no_tool_call():
    text = '<executable_start> ```function\n[{"name": "a", "arguments": {"x": 1e999}}]```<executable_end>'
    assert parse_tool_calls(text).calls == []


@pytest.fixture(scope="module")
def overflowing(adapter_forms, tmp_path_factory):
    """An adapter of finite weights with which every logit overflows."""
    adapter = read_adapter(adapter_forms["folder"])
    weights = {name: LazyTensor.of(np.full(tensor.shape, 1e30, np.float32)) for name, tensor in adapter.weights.items()}
    folder = tmp_path_factory.mktemp("overflow") / "adapter"
    write_adapter_folder(folder, Adapter(adapter.config, adapter.base, weights))
    return folder


def test_log_probabilities_over_http_are_json(model_folder, overflowing):
    value = {"model": "x", "messages": chat("list the files"), "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    for more in ({}, {"stream": True}):
        with running(model_folder, {"x": overflowing}, ServeConfig(port=0)) as server:
            body = json.dumps({**value, **more}).encode()
            reply = parse_reply(send(server.url, request_bytes("POST", "/v1/chat/completions", body)))
        assert reply.status == 200
        assert b"NaN" not in reply.body
        assert b"Infinity" not in reply.body
        if not more:
            assert strict(reply.body)["choices"][0]["logprobs"]["content"][0]["logprob"] is None


def test_a_loss_that_is_no_number_is_null(model_folder, overflowing, data_folder, capsys):
    from mlx_afm_cli.main import main

    line = ["lora", "--test", "--model", model_folder, "--adapter-path", overflowing, "--data", data_folder, "--json"]
    with pytest.raises(SystemExit):
        main([str(argument) for argument in [*line, "--no-cache"]])
    assert strict(capsys.readouterr().out)["test_loss"] is None
