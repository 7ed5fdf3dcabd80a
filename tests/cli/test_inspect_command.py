from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "formats" / "fixtures"
SIZES = {"vocab_size": 512, "hidden_dim": 96, "num_layers": 6, "num_kv_reuse_layers": 2, "num_heads": 4}
# Counted by hand from the sizes: 6 layers of 96, heads of 24, feed-forward of 312, two of them without K and V.
WEIGHTS = (
    512 * 96 + 96  # embedding, output norm
    + 4 * ((96 + 48 + 48) * 96 + 2 * 24)  # q, k, v and the norms of q and k
    + 2 * (96 * 96 + 24)  # q and its norm
    + 6 * (96 * 96 + 3 * 96 * 312 + 2 * 96)  # attention output, feed-forward, norms
)  # fmt: skip
ADAPTER = 32 * (4 * (96 + 96 + 2 * (96 + 48)) + 2 * (96 + 96) + 6 * (96 + 96 + 3 * (96 + 312)))


@pytest.fixture
def look(cli):
    def inspect(path):
        told = cli("inspect", path, "--json").json
        assert told["path"] == str(path)
        return told

    return inspect


@pytest.mark.parametrize("part", ["", ".."])
def test_toolkit_folder(part, toolkit_folder, look):
    told = look(toolkit_folder / part)
    assert told["kind"] == "toolkit folder"
    assert SIZES.items() <= told["model"].items()
    assert (told["adapter"], told["tokenizer"], told["tensors"]) == ("base_adapter", True, 147)
    assert told["parameters"] == WEIGHTS + ADAPTER
    assert (told["ordinary_layers"], told["kv_reuse_layers"]) == (4, 2)


def test_torch_checkpoint(toolkit_folder, look):
    told = look(toolkit_folder / "base-model.pt")
    assert told["kind"] == "torch checkpoint"
    assert told["parameters"] == WEIGHTS + ADAPTER
    assert told["adapter_ids"] == ["base_adapter"]
    assert told["dtypes"] == {"float32": 138, "int64": 8}
    assert (told["form"], told["wrapper_key"]) == ("zip", None)


@pytest.mark.parametrize(
    ("name", "form", "key"),
    [("wrapped", "zip", "state_dict"), ("legacy", "legacy", None), ("legacy_training", "legacy", "model")],
)
def test_other_forms_of_checkpoints(name, form, key, look):
    told = look(FIXTURES / f"{name}.pt")
    assert (told["kind"], told["form"], told["wrapper_key"]) == ("torch checkpoint", form, key)


def test_adapter_checkpoint(adapter_forms, look):
    told = look(adapter_forms["pt"])
    assert told["kind"] == "toolkit adapter checkpoint"
    assert (told["parameters"], told["bytes"], told["tensors"]) == (ADAPTER, 4 * ADAPTER, 76)
    assert told["adapter_ids"] == ["base_adapter"]


def test_model_folder(model_folder, look):
    told = look(model_folder)
    assert told["kind"] == "MLX model folder"
    assert SIZES.items() <= told["model"].items()
    assert told["parameters"] == WEIGHTS
    assert all(told[part] for part in ("tokenizer", "base_adapter", "observers", "toolkit_config"))


def test_adapter_folder(adapter_forms, look):
    told = look(adapter_forms["folder"])
    assert told["kind"] == "MLX adapter folder"
    assert (told["rank"], told["scale"], told["parameters"]) == (32, 0.5, ADAPTER)
    assert (told["fine_tune_type"], told["layers"]) == ("lora", "all")
    assert told["targets"] == ["q", "k", "v", "o", "gate", "up", "down"]


def test_package(adapter_forms, look):
    told = look(adapter_forms["fmadapter"])
    assert told["kind"] == "adapter package"
    assert (told["identifier"], told["rank"], told["layers"]) == ("fmadapter-box-9799725", 32, [4, 2])
    assert (told["parameters"], told["dtypes"]) == (ADAPTER, {"float16": 76})


def test_tokenizer(toolkit_folder, look):
    told = look(toolkit_folder / "tokenizer.model")
    assert (told["kind"], told["vocab_size"]) == ("SentencePiece tokenizer", 512)
    assert {"<turn_start>", "<turn_end>"} <= set(told["special_pieces"])


def test_other_files(toolkit_folder, model_folder, look):
    told = look(toolkit_folder / "base-model-config.json")
    assert told["kind"] == "toolkit model configuration"
    assert SIZES.items() <= told["model"].items()
    told = look(model_folder / "model.safetensors")
    assert (told["kind"], told["parameters"]) == ("safetensors file", WEIGHTS)


def test_data(data_folder, look):
    told = look(data_folder)
    assert told["kind"] == "training data folder"
    assert told["lines"] == {"test.jsonl": 4, "train.jsonl": 20, "valid.jsonl": 4}
    told = look(data_folder / "train.jsonl")
    assert (told["kind"], told["lines"]) == ("training data", 20)


def test_for_people(adapter_forms, cli):
    ran = cli("inspect", adapter_forms["folder"])
    rows = dict(line.split("  ", 1) for line in ran.out.splitlines())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["kind"] == "MLX adapter folder"
    assert rows["parameters"] == f"{ADAPTER:,}"
    assert rows["targets"] == "q, k, v, o, gate, up, down"
    assert rows["dtypes"] == "float32 76"
    assert rows["recognised"] == "none"
    assert ran.err == ""


@pytest.mark.parametrize("name", ["notes.txt", "folder", "nothing"])
def test_unknown(name, tmp_path, expect_refusal):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "folder").mkdir()
    reasons = {
        "notes.txt": ["an unknown kind of file", "expected .pt, .safetensors"],
        "folder": ["an unknown kind of folder", "expected a toolkit, model, adapter or data folder"],
        "nothing": ["no such file or folder"],
    }
    expect_refusal("inspect", tmp_path / name, "--json", says=[tmp_path / name, *reasons[name]])
