"""Files that are not what they seem: the message names the cause, not its consequence."""

import json
import shutil

import mlx.core as mx
import pytest

import mlx_afm
from mlx_afm.formats.mlx_folder import read_shards, write_shards
from mlx_afm.formats.torch_file import read_torch, write_torch

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12726648832\n"
LFS = ["a Git LFS pointer", "expected 12,726,648,832 bytes", "git lfs pull"]


@pytest.mark.parametrize("file", ["base-model.pt", "tokenizer.model", "base-model-config.json"])
def test_a_git_lfs_pointer_in_a_toolkit_folder(file, toolkit_folder, copy_of, tmp_path, expect_refusal):
    folder = copy_of(toolkit_folder)
    (folder / file).write_bytes(POINTER)
    says = [folder / file, *LFS]
    expect_refusal("convert", "--hf-path", folder, "--mlx-path", tmp_path / "out", says=says)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.model", "config.json"])
def test_a_git_lfs_pointer_in_a_model_folder(file, model_folder, copy_of, data_folder, tmp_path, expect_refusal):
    folder = copy_of(model_folder)
    (folder / file).write_bytes(POINTER)
    expect_refusal("generate", "--model", folder, "--prompt", "hi", says=[folder / file, *LFS])
    expect_refusal("lora", "--train", "--model", folder, "--data", data_folder, "--adapter-path", tmp_path / "a",
                   says=[folder / file, *LFS])  # fmt: skip


@pytest.mark.parametrize(
    ("form", "file"), [("folder", "adapters.safetensors"), ("pt", ""), ("fmadapter", "adapter_weights.bin")]
)
def test_a_git_lfs_pointer_in_an_adapter(form, file, adapter_forms, model_folder, tmp_path, expect_refusal):
    source, target = adapter_forms[form], tmp_path / adapter_forms[form].name
    shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    (target / file if file else target).write_bytes(POINTER)
    command = ("generate", "--model", model_folder, "--adapter-path", target, "--prompt", "hi")
    expect_refusal(*command, says=LFS)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_shard_that_is_missing_is_named(with_index, model_folder, copy_of, tmp_path, expect_refusal):
    folder = copy_of(model_folder)
    tensors = read_shards(model_folder)
    (folder / "model.safetensors").unlink()
    write_shards(folder, tensors, max_shard_bytes=1 << 20)
    assert mlx_afm.load(folder)
    lost = folder / "model-00002-of-00003.safetensors"
    lost.unlink()
    if not with_index:
        (folder / "model.safetensors.index.json").unlink()
    says = ["weight files are missing (expected 3 files, found 2)", lost.name]
    for command in ("generate", "convert"):
        options = ("--prompt", "hi") if command == "generate" else ("--mlx-path", tmp_path / "out")
        message = expect_refusal(command, "--model", folder, *options, says=says)
        assert "surplus" not in message


def test_an_index_that_is_none(model_folder, copy_of, expect_refusal):
    folder = copy_of(model_folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    expect_refusal("generate", "--model", folder, "--prompt", "hi", says=["not an index of weights"])


PREFIXES = {"_orig_mod.": "torch.compile adds", "module.": "DistributedDataParallel add", "model.": "Save the tensors"}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_prefix_too_many_in_a_toolkit_checkpoint(prefix, toolkit_folder, copy_of, tmp_path, expect_refusal):
    folder = copy_of(toolkit_folder)
    tensors = read_torch(toolkit_folder / "base-model.pt")
    write_torch(folder / "base-model.pt", {prefix + name: tensor for name, tensor in tensors.items()})
    says = [f"the tensor names have the prefix {prefix!r}", "expected embedding.weight", PREFIXES[prefix]]
    message = expect_refusal("convert", "--hf-path", folder, "--mlx-path", tmp_path / "out", says=says)
    assert "\n" not in message.strip()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("with_model", [True, False])
def test_one_prefix_too_many_in_an_adapter_pt(
    prefix, with_model, adapter_forms, model_folder, tmp_path, expect_refusal
):
    tensors = read_torch(adapter_forms["pt"])
    write_torch(tmp_path / "a.pt", {prefix + name: tensor for name, tensor in tensors.items()})
    options = ("--model", model_folder) if with_model else ()
    says = [f"the tensor names have the prefix {prefix!r}", PREFIXES[prefix]]
    expect_refusal("adapter", "convert", tmp_path / "a.pt", tmp_path / "out", *options, says=says)


@pytest.mark.parametrize(("old", "new"), [("", "language_model."), ("", "module."), ("model.", "")])
def test_a_prefix_too_many_or_too_few_in_a_model_folder(old, new, model_folder, copy_of, expect_refusal):
    folder = copy_of(model_folder)
    file = folder / "model.safetensors"
    arrays = {new + name.removeprefix(old): array for name, array in mx.load(str(file)).items()}
    mx.save_safetensors(str(file), arrays)
    says = ["the tensor names have the prefix" if new else "the tensor names lack the prefix 'model.'"]
    expect_refusal("generate", "--model", folder, "--prompt", "hi", says=says)


def test_other_tensors_are_still_listed(model_folder, copy_of, expect_refusal):
    folder = copy_of(model_folder)
    file = folder / "model.safetensors"
    arrays = mx.load(str(file))
    arrays["module.extra"] = arrays.pop("model.output_norm.weight")
    mx.save_safetensors(str(file), arrays)
    says = ["missing: model.output_norm.weight", "surplus: module.extra"]
    expect_refusal("generate", "--model", folder, "--prompt", "hi", says=says)


@pytest.fixture
def mlx_lm_adapter(cli, model_folder, data_folder, tmp_path):
    """A function that trains an adapter and writes its configuration as mlx-lm does."""

    def make(options, num_layers, keys=None):
        folder = tmp_path / "adapter"
        ran = cli("lora", "--train", "--model", model_folder, "--data", data_folder, "--adapter-path", folder,
                  "--iters", 3, "--rank", 4, *options)  # fmt: skip
        assert ran.code == 0, ran.err
        parameters = {"rank": 4, "scale": 0.5, "dropout": 0.0, **({} if keys is None else {"keys": keys})}
        values = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters, "model": "m"}
        ours = (folder / "adapter_config.json").read_text()
        (folder / "adapter_config.json").write_text(json.dumps(values))
        return folder, ours

    return make


QKV, Q, UP = "self_attn.qkv_proj", "self_attn.q_proj", "mlp.up_proj"


@pytest.mark.parametrize(
    ("options", "num_layers", "keys"),
    [
        (("--layers", "last-2"), 2, None),
        (("--targets", "up"), -1, [UP]),
        (("--targets", "q,k,v,up", "--layers", "last-3"), 3, [UP, QKV, Q]),
        (("--targets", "q,k,v", "--layers", "ordinary"), -1, [QKV]),
        (("--targets", "q", "--layers", "reuse"), 0, [Q]),
    ],
)
def test_mlx_lms_num_layers_and_keys_are_honoured(options, num_layers, keys, mlx_lm_adapter, model_folder, say, cli):
    folder, ours = mlx_lm_adapter(options, num_layers, keys)
    options = ("--adapter-path", folder, "--no-system-prompt")  # mlx-lm records no system prompt
    found = say(*options)
    (folder / "adapter_config.json").write_text(ours)
    assert found == say(*options)


@pytest.mark.parametrize(
    ("num_layers", "keys", "says"),
    [
        (-1, ["self_attn.k_proj"], ["keys with modules", "expected some of self_attn.qkv_proj", "self_attn.k_proj"]),
        (-1, [QKV, UP], ["keys that mlx-afm cannot load", "self_attn.qkv_proj and self_attn.q_proj, or neither"]),
        (16, None, ["the model has no such layers", "found last-16"]),
        ("all", None, ["num_layers is not a whole number", "'all'"]),
        (-1, [], ["keys is not a list of module names"]),
    ],
)
def test_configurations_of_mlx_lm_that_cannot_be_loaded(
    num_layers, keys, says, adapter_forms, model_folder, copy_of, expect_refusal
):
    folder = copy_of(adapter_forms["folder"], "theirs")
    parameters = {"rank": 32, "scale": 0.5, "dropout": 0.0, **({} if keys is None else {"keys": keys})}
    values = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    command = ("generate", "--model", model_folder, "--adapter-path", folder, "--prompt", "hi")
    message = expect_refusal(*command, says=[folder, *says])
    assert "another base model" not in message


def test_the_lists_of_mlx_lms_own_class_are_named(adapter_forms, model_folder, copy_of, expect_refusal):
    folder = copy_of(adapter_forms["folder"], "theirs")
    file = folder / "adapters.safetensors"
    places = {f".qkv_proj.{part}.lora_{side}": f".qkv_proj.lora_{side}.{number}"
              for number, part in enumerate("qkv") for side in "ab"}  # fmt: skip
    renamed = {}
    for name, array in mx.load(str(file)).items():
        end = next((end for end in places if name.endswith(end)), "")
        renamed[name.removesuffix(end) + places.get(end, "") if end else name] = array
    mx.save_safetensors(str(file), renamed)
    says = ["mlx-lm's own afm7 class", "lists of arrays", "lora_a.0"]
    expect_refusal("generate", "--model", model_folder, "--adapter-path", folder, "--prompt", "hi", says=says)


def test_an_adapter_of_mlx_lm_exports_with_the_model_given(mlx_lm_adapter, model_folder, tmp_path, cli):
    """Its configuration has no sizes of the base; --model has."""
    folder, _ = mlx_lm_adapter((), -1)
    options = ("--name", "box", "--output-dir", tmp_path / "out", "--model", model_folder)
    ran = cli("export", "--adapter-path", folder, *options)
    assert ran.code == 0, ran.err
