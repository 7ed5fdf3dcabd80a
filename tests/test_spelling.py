import pytest

from mlx_afm.spelling import nearest_name

KNOWN = (
    "batch_size",
    "iters",
    "alpha",
    "learning_rate",
    "val_batches",
    "sample_prompt",
    "num_layers",
    "layers",
    "warmup",
)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("batchsize", "batch_size"),
        ("batch-sizes", "batch_size"),
        ("itres", "iters"),
        ("aplha", "alpha"),
        ("lerning_rate", "learning_rate"),
        ("Warm_up", "warmup"),
        ("test_batches", None),
        ("mask_prompt", None),
        ("lora_layers", None),
        ("rate", None),
        ("", None),
    ],
)
def test_only_a_misspelling_has_a_nearest_name(name, near):
    assert nearest_name(name, KNOWN) == near
