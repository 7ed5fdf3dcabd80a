"""What users get wrong: one clear message, exit 1, nothing written.

A message says what is wrong, where (file, line, tensor), what was expected and, where it is not plain,
what to do. `expect_refusal` checks the exit code, that there is no traceback, and that no file changed.
"""

import json

import pytest

from mlx_afm.formats.safetensors_file import read_safetensors, write_safetensors
from mlx_afm.formats.torch_file import read_torch, write_torch

LORA_CONFIG = {"__tamm_type__": "adapters:LoRAModelAdapter", "alpha": 16, "rank": 32}

# Toolkit folders ------------------------------------------------------------------------------------


@pytest.fixture
def expect_toolkit_refusal(toolkit_folder, tmp_path, copy_of, expect_refusal):
    """Damages a copy of the toolkit folder with a function and converts it, in vain."""

    def run(damage, says, *options):
        folder = copy_of(toolkit_folder)
        damage(folder)
        return expect_refusal("convert", "--hf-path", folder, "--mlx-path", tmp_path / "out", *options, says=says)

    return run


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("base-model.pt", ["no toolkit checkpoint", "expected base-model.pt", "Give the toolkit's folder"]),
        ("base-model-config.json", ["missing base-model-config.json", "lie side by side"]),
        ("tokenizer.model", ["missing tokenizer.model", "--no-tokenizer"]),
    ],
)
def test_a_part_of_the_toolkit_folder_is_missing(file, says, tmp_path, expect_toolkit_refusal):
    expect_toolkit_refusal(lambda folder: (folder / file).unlink(), [tmp_path / "assets", *says])


def test_a_source_that_is_not_there(tmp_path, expect_refusal):
    nothing = tmp_path / "nothing"
    expect_refusal(
        "convert", "--hf-path", nothing, "--mlx-path", tmp_path / "out", says=[nothing, "no toolkit checkpoint"]
    )
    lone = tmp_path / "nothing.pt"
    says = [tmp_path, "missing nothing.pt and nothing-config.json"]
    expect_refusal("convert", "--hf-path", lone, "--mlx-path", tmp_path / "out", says=says)


def test_a_toolkit_folder_where_an_mlx_folder_is_needed(toolkit_folder, data_folder, tmp_path, expect_refusal):
    says = [toolkit_folder, "no config.json", "expected an MLX model folder", "mlx-afm convert --hf-path"]
    expect_refusal("convert", "--hf-path", toolkit_folder, "--to", "torch", "--out", tmp_path / "out", says=says)
    expect_refusal("generate", "--model", toolkit_folder, "--prompt", "a", says=says)
    expect_refusal("fuse", "--model", toolkit_folder, "--save-path", tmp_path / "out", says=says)
    expect_refusal("lora", "--train", "--model", toolkit_folder / "nothing", "--data", data_folder,
            says=["nothing: no such folder", "expected an MLX model folder"])  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"nun_heads": 4}, ["nun_heads: unknown field; is it 'num_heads'?"]),
        ({"__tamm_type__": "models:AFMTextV6Config"}, ["expected AFMTextV7Config, found models:AFMTextV6Config"]),
        ({"__tamm_type__": None}, ["wrong __tamm_type__", "expected AFMTextV7Config"]),
        ({"num_heads": 5, "num_kv_heads": 3}, ["hidden_dim 96 is not a multiple of num_heads 5", "num_kv_heads 3"]),
        ({"num_kv_reuse_layers": 6}, ["num_kv_reuse_layers: expected 0 to 5, found 6"]),
        ({"hidden_dim": "96"}, ["hidden_dim: expected a number, found '96'"]),
        ({"num_layers": 0}, ["num_layers: expected from 1 to 1000, found 0"]),
        ({"attention_dropout_p": 0.1, "foo": 1}, ["attention_dropout_p: only 0 is supported", "foo: unknown field"]),
        ({"arch_optimizers": [1]}, ["arch_optimizers is not an object of objects"]),
        ({"adapters": {"a": 3}}, ["adapters is not an object of objects"]),
        (
            {"adapters": {"a": LORA_CONFIG, "b": LORA_CONFIG}},
            ["more than one adapter", "expected one, found ['a', 'b']"],
        ),
        ({"adapters": {"a": {**LORA_CONFIG, "rank": 0}}}, ["rank and alpha must be positive numbers", "found rank 0"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_configuration_that_cannot_be_honoured(changes, says, tmp_path, edit_json, expect_toolkit_refusal):
    file = tmp_path / "assets" / "base-model-config.json"
    expect_toolkit_refusal(lambda folder: edit_json(file, **changes), [file, *says])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"num_layers": 6,', ["base-model-config.json: not JSON", "line 1 column"]),
        (b'{"name": "\xff"}', ["base-model-config.json, byte 10: not UTF-8"]),
        (b"[1]", ["base-model-config.json: not a JSON object", "found list"]),
        (b'{"num_layers": ' + b"1" * 5000 + b"}", ["base-model-config.json: not JSON"]),
        (b"[" * 100_000, ["base-model-config.json: not JSON"]),
        (b"", ["base-model-config.json: not JSON"]),
    ],
    ids=["cut", "latin", "list", "digits", "deep", "empty"],
)
def test_a_configuration_that_is_no_json_object(content, says, expect_toolkit_refusal):
    expect_toolkit_refusal(lambda folder: (folder / "base-model-config.json").write_bytes(content), says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_dim": 128}, ["wrong shape: embedding.weight: expected (512, 128), found (512, 96)", "... and "]),
        ({"vocab_size": 500}, ["wrong shape: output_transform.weight: expected (500, 96), found (512, 96)"]),
        ({"num_layers": 5}, ["surplus: layers.segment_0.layer_3.attention.norm.weight, shape (96,)"]),
        ({"num_layers": 7}, ["missing: layers.segment_0.layer_4.attention.norm.weight, shape (96,)"]),
        ({"adapters": None}, ["missing: layers.segment_0.layer_0.attention.qkv_transform.fused_linear.weight"]),
        ({"arch_optimizers": None}, ["surplus: ", "key_quantizer.activation_post_process.range, shape (2,)"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_configuration_of_another_checkpoint(changes, says, tmp_path, edit_json, expect_toolkit_refusal):
    file = tmp_path / "assets" / "base-model-config.json"
    where = [tmp_path / "assets" / "base-model.pt", "Does base-model-config.json belong to this checkpoint?"]
    expect_toolkit_refusal(lambda folder: edit_json(file, **changes), [*where, *says])


def _cut(folder, keep):
    raw = (folder / "base-model.pt").read_bytes()
    (folder / "base-model.pt").write_bytes(raw[: int(len(raw) * keep)])


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_a_truncated_checkpoint(keep, expect_toolkit_refusal):
    says = ["base-model.pt: no end record at the end of the zip", "cut short", "copy or download it again"]
    expect_toolkit_refusal(lambda folder: _cut(folder, keep), says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ["base-model.pt: file is empty"]),
        (
            b"garbage" * 999,
            ["base-model.pt: not a torch checkpoint", "expected a zip archive or torch's pickles, found bytes"],
        ),
        (b"PK\x03\x04" + bytes(4096), ["base-model.pt: no end record"]),
    ],
    ids=["empty", "garbage", "zeros"],
)
def test_a_checkpoint_that_is_none(content, says, expect_toolkit_refusal):
    expect_toolkit_refusal(lambda folder: (folder / "base-model.pt").write_bytes(content), says)


def test_a_head_that_is_not_the_embedding(toolkit_folder, expect_toolkit_refusal):
    state = dict(read_torch(toolkit_folder / "base-model.pt"))
    state["output_transform.weight"] = type(state["embedding.weight"]).of(state["embedding.weight"].read_values() + 1)
    says = ["base-model.pt: output_transform.weight is not embedding.weight", "a model with its own head cannot be"]
    expect_toolkit_refusal(lambda folder: write_torch(folder / "base-model.pt", state), says)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x0a\xff\xff\xff\x7f"])
def test_a_tokenizer_that_is_none(content, expect_toolkit_refusal):
    says = ["tokenizer.model: not a SentencePiece model", "Copy the original tokenizer.model again"]
    expect_toolkit_refusal(lambda folder: (folder / "tokenizer.model").write_bytes(content), says)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_target_in_the_way(kind, toolkit_folder, model_folder, adapter_forms, tmp_path, expect_refusal):
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine").write_text("mine")
    says = [f"{target}: the target exists already. Remove it or choose another"]
    expect_refusal("convert", "--hf-path", toolkit_folder, "--mlx-path", target, says=says)
    expect_refusal("convert", "--hf-path", model_folder, "--to", "torch", "--out", target, says=says)
    expect_refusal(
        "fuse", "--model", model_folder, "--adapter-path", adapter_forms["pt"], "--save-path", target, says=says
    )
    expect_refusal("adapter", "convert", adapter_forms["folder"], target, says=says)


def test_a_file_where_a_package_should_go(adapter_forms, tmp_path, expect_refusal):
    (tmp_path / "box.fmadapter").write_text("mine")
    expect_refusal("export", "--adapter-path", adapter_forms["pt"], "--name", "box", "--output-dir", tmp_path,
            says=["cannot tell which model", "Give the base model with --model"])  # fmt: skip
    expect_refusal("export", "--adapter-path", adapter_forms["folder"], "--name", "box", "--output-dir", tmp_path,
            says=[tmp_path / "box.fmadapter", "in the way: not a folder"])  # fmt: skip


@pytest.mark.parametrize("name", ["file", "run.pt", "run.fmadapter"])
def test_a_run_needs_a_folder(name, model_folder, data_folder, tmp_path, expect_refusal):
    (tmp_path / "file").write_text("mine")
    expect_refusal("lora", "--train", "--model", model_folder, "--data", data_folder, "--adapter-path", tmp_path / name,
            says=[tmp_path / name, "expected a folder", "Choose another --adapter-path"])  # fmt: skip


# Model folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llama"}, ["config.json: not an AFM text v7 model", "expected afm7, found llama"]),
        ({"rope_theta": None}, ["config.json: keys are missing", "rope_theta"]),
        ({"num_heads": None, "num_head": 4}, ["num_heads (is it 'num_head'?)"]),
        ({"hidden_dim": "wide"}, ["config.json: ", "hidden_dim: expected a number, found 'wide'"]),
        ({"num_layers": 7}, ["the tensors are not those of the model", "missing: model.layers.4.self_attn.qkv_proj"]),
        ({"quantization": {"bits": 4}}, ["config.json: a quantization entry, but no quantized tensor"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_model_folder_with_another_config(changes, says, model_folder, copy_of, edit_json, expect_refusal):
    folder = copy_of(model_folder)
    edit_json(folder / "config.json", **changes)
    expect_refusal("generate", "--model", folder, "--prompt", "a", says=[folder, *says])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-8]), ["model.output_norm.weight: the values do not fit"]),
        (lambda file: file.write_bytes(b"xx"), ["model.safetensors: not a safetensors file"]),
        (lambda file: file.unlink(), ["no weights", "expected model*.safetensors"]),
        (lambda file: file.with_name("config.json").write_text("[]"), ["config.json: not a JSON object"]),
        (lambda file: file.with_name("tokenizer.model").write_bytes(b"x"), ["tokenizer.model: not a SentencePiece"]),
    ],
    ids=["cut", "garbage", "missing", "config", "tokenizer"],
)
def test_a_damaged_model_folder(damage, says, model_folder, copy_of, expect_refusal):
    folder = copy_of(model_folder)
    damage(folder / "model.safetensors")
    expect_refusal("generate", "--model", folder, "--prompt", "a", says=[folder, *says])


def test_a_tensor_of_the_model_is_missing(model_folder, copy_of, expect_refusal):
    file = copy_of(model_folder) / "model.safetensors"
    tensors = {name: tensor for name, tensor in read_safetensors(file).items() if "layers.2.mlp.up" not in name}
    file.unlink()
    write_safetensors(file, tensors)
    expect_refusal("generate", "--model", file.parent, "--prompt", "a",
            says=[file.parent, "missing: model.layers.2.mlp.up_proj.weight, shape (312, 96)"])  # fmt: skip


def test_words_need_a_tokenizer(model_folder, data_folder, copy_of, expect_refusal):
    folder = copy_of(model_folder)
    (folder / "tokenizer.model").unlink()
    says = ["the model folder has no tokenizer", "Convert again with tokenizer.model in place"]
    expect_refusal("generate", "--model", folder, "--prompt", "a", says=says)
    expect_refusal("lora", "--train", "--model", folder, "--data", data_folder, says=[folder, *says])


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (b"say <turn_end> now", ["'<turn_end>'", "column 5", "Change the text"]),
        (b"caf\xe9", ["stdin, byte 4: not UTF-8 text"]),
    ],
)
def test_a_prompt_that_is_no_text(prompt, says, model_folder, expect_refusal):
    expect_refusal("generate", "--model", model_folder, "--prompt", "-", says=says, stdin=prompt)


# Training data --------------------------------------------------------------------------------------


def line(*turns):
    roles = ("user", "assistant")
    return json.dumps([{"role": roles[index % 2], "content": text} for index, text in enumerate(turns)])


@pytest.fixture
def expect_data_refusal(model_folder, tmp_path, expect_refusal):
    """Trains on the given lines, in vain."""

    def run(content, says, *options):
        file = tmp_path / "train.jsonl"
        file.write_bytes(content if isinstance(content, bytes) else ("\n".join(content) + "\n").encode())
        return expect_refusal("lora", "--train", "--model", model_folder, "--data", file,
                       "--adapter-path", tmp_path / "run",
                       *options, says=says)  # fmt: skip

    return run


def test_all_faulty_lines_come_in_one_message(tmp_path, expect_data_refusal):
    faults = {
        1: ('[{"role": "user"', "column 17: not JSON"),
        3: ('[{"role": "robot", "content": "a"}]', "message 0: unknown role (expected one of system, user, assistant"),
        4: (
            line("stop <turn_end>", "b"),
            "message 0, content column 6: content spells out the special token '<turn_end>'",
        ),
        5: (line("a", "b", "c", " "), "message 3: an empty answer teaches the model to say nothing"),
        6: ('"text"', "not a record (expected a list of messages or an object, found str)"),
        8: (line("a"), "nothing to learn from: no assistant message. Add the answer"),
        9: (line("a", "b", "c"), "message 2: the conversation does not end with an answer (expected role 'assistant'"),
        10: ('[{"role": "user", "content": ["a"]}]', "message 0: a part of the content is not text (expected {"),
        11: ('[{"role": "assistant", "content": "a"}]', "no user message (found 1 messages)"),
        12: ('[{"role": "user", "content": "a", "wait": 1}]', "unknown keys for role 'user': wait"),
        13: ("[" + "9" * 5000 + "]", "not JSON"),
        14: ('{"prompt": "a", "answer": "b"}', "a record of no data format we know"),
        15: ("[" * 100_000, "JSON nested too deeply"),
    }
    lines = [faults[number][0] if number in faults else ["", line("a", "b")][number % 2] for number in range(1, 16)]
    message = expect_data_refusal(
        lines, [tmp_path / "train.jsonl", f"{len(faults)} faulty line(s)", "correct the lines"]
    )
    found = message.splitlines()[1:]
    assert len(found) == len(faults)
    for (number, (_, reason)), text in zip(faults.items(), found):
        assert text.startswith(f"  train.jsonl line {number}")
        assert reason in text


def test_of_very_many_faults_twenty_are_shown(expect_data_refusal):
    message = expect_data_refusal(["{}"] * 33, ["33 faulty line(s)", "line 20:", "... and 13 more"])
    assert "line 21" not in message


def test_examples_that_are_too_long(expect_data_refusal):
    lines = [line("a", "b"), line("word " * 90, "b"), line("a", "b"), line("a", "word " * 90)]
    says = ["2 faulty line(s)", "too long (expected at most 60 tokens", "--max-seq-length", "--truncation"]
    message = expect_data_refusal(lines, says, "--max-seq-length", 60)
    assert [text.partition(":")[0].strip() for text in message.splitlines()[1:]] == [
        "train.jsonl line 2",
        "train.jsonl line 4",
    ]


def test_half_a_surrogate_pair(expect_data_refusal):
    says = ["1 faulty line(s)", "train.jsonl line 2: message 0, content column 1: not text: a lone surrogate"]
    expect_data_refusal(
        [line("a", "b"), '[{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]'], says
    )


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_no_examples(content, tmp_path, expect_data_refusal):
    expect_data_refusal(content, [tmp_path / "train.jsonl", "no examples", "expected at least one record"])


def test_text_that_is_not_utf_8(tmp_path, expect_data_refusal):
    content = line("a", "b").encode() + b"\n" + line("caf", "b").encode().replace(b"caf", b"caf\xe9") + b"\n"
    position = content.splitlines()[1].index(b"\xe9") + 1
    says = [
        tmp_path / "train.jsonl",
        f"train.jsonl line 2, column {position}: not UTF-8 text",
        "Save the file as UTF-8",
    ]
    expect_data_refusal(content, says)


def test_data_that_is_not_there(model_folder, data_folder, tmp_path, expect_refusal):
    run = ("lora", "--train", "--model", model_folder, "--adapter-path", tmp_path / "run", "--data")
    expect_refusal(
        *run, tmp_path / "nothing", says=[tmp_path / "nothing", "no such file or folder", "expected training data"]
    )
    (tmp_path / "data").mkdir()
    expect_refusal(*run, tmp_path / "data", says=[tmp_path / "data", "no train split", "expected train.jsonl"])
    (tmp_path / "data" / "train.jsonl").write_bytes((data_folder / "train.jsonl").read_bytes())
    (tmp_path / "data" / "valid.jsonl").write_text("{}\n")
    expect_refusal(*run, tmp_path / "data", says=[tmp_path / "data" / "valid.jsonl", "valid.jsonl line 1: no messages"])


# Settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--iters", "0", "--batch-size", "-1"],
            ["iters: expected at least 1, found 0", "batch_size: expected at least 1"],
        ),
        (["--learning-rate", "0"], ["learning_rate: expected a finite number above 0, found 0"]),
        (["--learning-rate", "nan"], ["learning_rate: expected a finite number above 0, found nan"]),
        (["--warmup", "1.5"], ["warmup: expected a share from 0 to below 1 or a whole number of steps, found 1.5"]),
        (["--val-batches", "0"], ["val_batches: expected at least 1, or -1 for all, found 0"]),
        (["--seed", "-1"], ["seed: expected from 0 to 2^63 - 1, found -1"]),
        (["--rank", "0", "--scale", "-1"], ["rank: expected a whole number from 1 on", "scale: expected more than 0"]),
        (["--dropout", "1"], ["dropout: expected from 0 to less than 1"]),
        (["--targets", "q,zz"], ["targets: expected some of q,k,v,o,gate,up,down, found q,zz"]),
        (["--targets", ","], ["targets: expected some of", "found none"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_training_settings_out_of_range(options, says, model_folder, data_folder, tmp_path, expect_refusal):
    expect_refusal("lora", "--train", "--model", model_folder, "--data", data_folder,
            "--adapter-path", tmp_path / "run",
            *options, says=says, code=2)  # fmt: skip


def test_a_config_file_with_unknown_options(tmp_path, expect_refusal):
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\nlerning_rate: 1\nlora_layers: 3\n")
    says = [tmp_path / "run.yaml", "unknown options", "lerning_rate: is it 'learning_rate'?", "lora_layers"]
    expect_refusal("lora", "--train", "-c", tmp_path / "run.yaml", says=says, code=2)


@pytest.mark.parametrize("name", ["my-adapter", "a b", "", "a.b", "ü"])
def test_a_name_devices_refuse_is_found_before_anything_is_read(
    name, model_folder, tmp_path, expect_refusal, monkeypatch
):
    def read(*arguments, **settings):
        raise AssertionError("something was read")

    monkeypatch.setattr("mlx_afm.files.OpenFiles.read", read)
    monkeypatch.setattr("mlx_afm.workflows.lora.read_split", read)
    monkeypatch.setattr("mlx_afm.workflows.export.read_adapter", read)
    says = ["not a name that devices accept", "expected ASCII letters, digits and underscores", repr(name)]
    expect_refusal("lora", "--train", "--model", model_folder, "--data", tmp_path, "--adapter-path", tmp_path / "run",
            "--name", name, says=says, code=2)  # fmt: skip
    expect_refusal(
        "export",
        "--adapter-path",
        tmp_path / "any",
        "--name",
        name,
        "--output-dir",
        tmp_path / "out",
        says=says,
        code=2,
    )


def test_a_name_with_a_hyphen_comes_with_a_better_one(adapter_forms, tmp_path, expect_refusal):
    expect_refusal("adapter", "convert", adapter_forms["folder"], tmp_path / "my-box.fmadapter",
            says=["found 'my-box'", "Hyphens", "use e.g. my_box"], code=2)  # fmt: skip


def test_a_signature_must_be_one(adapter_forms, tmp_path, expect_refusal):
    expect_refusal("export", "--adapter-path", adapter_forms["folder"], "--name", "box",
            "--output-dir", tmp_path / "out",
            "--signature", "12ab", says=["signature must be 40 lower-case hex digits, not '12ab'"], code=2)  # fmt: skip


# Adapters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "pt", "fmadapter"])
def test_an_adapter_for_another_base(form, other_adapter, model_folder, data_folder, tmp_path, cli, expect_refusal):
    adapter = other_adapter
    if form != "folder":
        adapter = tmp_path / f"other.{form}"
        assert cli("adapter", "convert", other_adapter, adapter).code == 0
    sizes = ["hidden_dim: the model has 96, the adapter was made for 64", "num_layers: the model has 6", "Use it with"]
    tensors = ["wrong shape: layers.segment_0.layer_0.attention.qkv_transform.adapters.base_adapter.lora_0.a_transpose"]
    says = [adapter, *(["expected (96, 32), found (64, 32)", *tensors] if form == "pt" else sizes)]
    expect_refusal("generate", "--model", model_folder, "--prompt", "a", "--adapter-path", adapter, says=says)
    expect_refusal(
        "fuse", "--model", model_folder, "--adapter-path", adapter, "--save-path", tmp_path / "out", says=says
    )
    expect_refusal("lora", "--test", "--model", model_folder, "--data", data_folder, "--adapter-path", other_adapter,
            says=[other_adapter, *sizes])  # fmt: skip


def test_an_adapter_that_is_not_there(model_folder, tmp_path, expect_refusal):
    nothing = tmp_path / "nothing"
    expected = "expected a folder with adapters.safetensors and adapter_config.json, a .pt or a .fmadapter"
    ask = ("generate", "--model", model_folder, "--prompt", "a", "--adapter-path")
    expect_refusal(*ask, nothing, says=[nothing, "no adapter here", expected])
    expect_refusal(*ask, f"{nothing}.pt", says=[f"{nothing}.pt: no such file"])
    expect_refusal(*ask, f"{nothing}.fmadapter", says=[f"{nothing}.fmadapter: no such package folder"])
    says = [nothing, "no such adapter", "expected an adapter folder, a .pt or a .fmadapter"]
    expect_refusal("adapter", "convert", nothing, tmp_path / "out", says=says)


def test_a_tensor_of_the_adapter_is_missing(adapter_forms, model_folder, tmp_path, copy_of, expect_refusal):
    folder = copy_of(adapter_forms["folder"])
    tensors = dict(read_safetensors(folder / "adapters.safetensors"))
    name = "model.layers.3.self_attn.qkv_proj.k.lora_b"
    del tensors[name]
    (folder / "adapters.safetensors").unlink()
    write_safetensors(folder / "adapters.safetensors", tensors)
    says = [folder, f"missing: {name}, shape (32, 48)", "another base model?"]
    expect_refusal("generate", "--model", model_folder, "--prompt", "a", "--adapter-path", folder, says=says)
    expect_refusal(
        "fuse", "--model", model_folder, "--adapter-path", folder, "--save-path", tmp_path / "out", says=says
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fine_tune_type": "prefix"}, ["expected fine_tune_type lora, dora, full, qat, found prefix"]),
        ({"lora_parameters": None}, ["not an adapter configuration", "expected an object with lora_parameters"]),
        ({"lora_parameters": {"rank": 32}}, ["lora_parameters without scale"]),
        ({"lora_parameters": {"rank": "a", "scale": 0.5}}, ["rank: expected a whole number from 1 on, found 'a'"]),
        ({"lora_parameters": {"rank": 32, "scale": 0.5, "targets": 3}}, ["expected targets a list"]),
        ({"lora_parameters": {"rank": 32, "scale": 0.5, "targets": [1]}}, ["targets: expected some of", "found 1"]),
        ({"base_model": 3}, ["expected targets a list and base_model an object"]),
        ({"base_model": {"model_type": "llama"}}, ["not an AFM text v7 model", "found llama"]),
    ],
    ids=str,
)
def test_an_adapter_configuration_that_cannot_be_used(changes, says, adapter_forms, model_folder, copy_of, edit_json,
                                                      expect_refusal):  # fmt: skip
    folder = copy_of(adapter_forms["folder"])
    edit_json(folder / "adapter_config.json", **changes)
    expect_refusal("generate", "--model", model_folder, "--prompt", "a", "--adapter-path", folder,
            says=[folder / "adapter_config.json", *says])  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("dora", ["magnitudes have no place in it", "found dora", "mlx-afm fuse"]),
        ("full", ["low-rank updates, not weights", "found full", "mlx-afm fuse"]),
    ],
)
def test_what_a_form_cannot_hold_is_not_written(kind, says, adapter_forms, tmp_path, copy_of, edit_json,
                                                expect_refusal):  # fmt: skip
    folder = copy_of(adapter_forms["folder"])
    edit_json(folder / "adapter_config.json", fine_tune_type=kind)
    expect_refusal("adapter", "convert", folder, tmp_path / "a.pt", says=says)
    expect_refusal("export", "--adapter-path", folder, "--name", "box", "--output-dir", tmp_path / "out", says=says)


def test_an_adapter_whose_configuration_is_not_its_own(adapter_forms, tmp_path, copy_of, edit_json, expect_refusal):
    folder = copy_of(adapter_forms["folder"])
    edit_json(folder / "adapter_config.json", lora_parameters={"rank": 32, "scale": 0.5, "targets": ["q"]})
    expect_refusal("export", "--adapter-path", folder, "--name", "box", "--output-dir", tmp_path / "out",
            says=["surplus: model.layers.0.self_attn.qkv_proj.k.lora_a", "configuration its own"])  # fmt: skip


def test_nothing_to_fuse(model_folder, tmp_path, expect_refusal):
    expect_refusal("fuse", "--model", model_folder, "--save-path", tmp_path / "out",
            says=[model_folder, "nothing to fuse", "Give --adapter-path"])  # fmt: skip


def _cut_weights(package):
    weights = package / "adapter_weights.bin"
    weights.write_bytes(weights.read_bytes()[:-64])


@pytest.mark.parametrize(
    ("damage", "rule", "says"),
    [
        (_cut_weights, "A7", ["adapter_weights.bin: not a sound MIL blob file", "copy or export it again"]),
        (lambda package: (package / "adapter_weights.bin").unlink(), "P2", ["adapter_weights.bin"]),
        (lambda package: (package / "metadata.json").unlink(), "P2", ["metadata.json: no such file"]),
        (lambda package: (package / "metadata.json").write_text("{"), "M1",
         ["metadata.json: not a UTF-8 JSON object", "line 1 column 2", "Copy or export the package again"]),
        (lambda package: (package / "metadata.json").write_text("{}"), "M2", ["key 'adapterIdentifier' is missing"]),
    ],
    ids=["weights-cut", "weights-missing", "metadata-missing", "metadata-cut", "metadata-empty"],
)  # fmt: skip
def test_a_damaged_package(damage, rule, says, adapter_forms, model_folder, copy_of, cli, expect_refusal):
    package = copy_of(adapter_forms["fmadapter"])
    damage(package)
    ran = cli("check", package)
    assert ran.code == 3
    assert f"FAIL {rule} " in ran.out
    assert ran.err == ""
    ask = ("generate", "--model", model_folder, "--prompt", "a", "--adapter-path", package)
    expect_refusal(*ask, says=[package, *says])


def test_check_needs_something_to_check(tmp_path, model_folder, cli, expect_refusal):
    expect_refusal(
        "check", tmp_path / "nothing.fmadapter", says=["nothing.fmadapter: no such package", "a .fmadapter folder"]
    )
    assert cli("check", model_folder).code == 3
    assert cli("check", model_folder / "config.json").code == 3
