from importlib import import_module
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_afm.errors import ConfigError
from mlx_afm.quant import QuantConfig, Scheme, parse_scheme, plan_schemes
from mlx_afm.quant.scheme import BITS, GROUP_SIZES

SHAPES = {
    "model.embedding": (512, 128),
    **{
        f"model.{kind}.{n}.{name}": (128, 416 if name.endswith("down_proj") else 128)
        for kind, count, first in (("layers", 6, "qkv_proj"), ("kv_reuse_layers", 2, "q_proj"))
        for n in range(count)
        for name in (f"self_attn.{first}", "mlp.up_proj", "mlp.down_proj")
    },
}


def test_one_scheme_for_all():
    plan = plan_schemes(QuantConfig(mode="affine", bits=8, group_size=32), SHAPES)
    assert plan.schemes == dict.fromkeys(SHAPES, Scheme(bits=8, group_size=32))
    assert plan.left_dense == ()


@pytest.mark.parametrize("config", [{"mode": "balanced"}, {"bits": 2}, {"bits": 3}])
def test_a_coarse_scheme_spares_the_embedding(config):
    plan = plan_schemes(QuantConfig(**config), SHAPES)
    assert plan.schemes["model.embedding"] == Scheme(bits=4)
    assert plan.schemes["model.layers.0.mlp.up_proj"] == Scheme(**config)


def test_groups_that_were_asked_for_are_kept_and_others_narrowed():
    down = "model.layers.0.mlp.down_proj"  # 416 = 13 * 32 columns
    assert plan_schemes(QuantConfig(bits=4), SHAPES).schemes[down] == Scheme(bits=4, group_size=32)
    asked = plan_schemes(QuantConfig(bits=4, group_size=64), SHAPES)
    assert down in asked.left_dense
    assert down not in asked.schemes
    assert plan_schemes(QuantConfig(mode="balanced", group_size=64), SHAPES).schemes[down].group_size == 32


def test_apples_recipe():
    plan = plan_schemes(QuantConfig(recipe="apple"), SHAPES)
    assert {scheme.mode for path, scheme in plan.schemes.items() if path != "model.embedding"} == {"balanced"}
    assert plan.schemes["model.embedding"] == Scheme(bits=4)
    assert plan.default.mode == "balanced"


def test_a_mixture_gives_the_outer_layers_and_the_embedding_more():
    schemes = plan_schemes(QuantConfig(recipe="mixed_3_6"), SHAPES).schemes
    high = {path for path, scheme in schemes.items() if scheme.bits == 6}
    assert {"model.embedding", "model.kv_reuse_layers.1.mlp.down_proj"} < high
    assert "model.layers.0.mlp.up_proj" not in high
    assert 1 < len(high) < len(SHAPES) / 2


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
def test_a_mixture_has_the_bits_of_mlx_lm(recipe):
    """Checked at the real number of layers: 35 and 21 that reuse keys are 56 to mlx-lm."""
    names = ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    ours = [f"model.{kind}.{n}" for kind, count in (("layers", 35), ("kv_reuse_layers", 21)) for n in range(count)]
    theirs = [f"model.layers.{n}" for n in range(56)]
    model = SimpleNamespace(layers=theirs, named_modules=lambda: [(f"{path}.mlp.down_proj", None) for path in theirs])
    rule = import_module("mlx_lm.convert").mixed_quant_predicate_builder(recipe, model)
    shapes = {f"{path}.{name}": (128, 128) for path in ours for name in names}
    schemes = plan_schemes(QuantConfig(recipe=recipe), shapes).schemes
    expected = [rule(f"{path}.{name}", None)["bits"] for path in theirs for name in names]
    assert [scheme.bits for scheme in schemes.values()] == expected


def test_a_predicate_chooses():
    def predicate(path, shape):
        if path == "model.embedding":
            return False
        return Scheme(mode="mxfp4") if shape[1] == 416 else True

    schemes = plan_schemes(QuantConfig(bits=8, predicate=predicate), SHAPES).schemes
    assert "model.embedding" not in schemes
    assert schemes["model.layers.0.mlp.down_proj"] == Scheme(mode="mxfp4")
    assert schemes["model.layers.0.mlp.up_proj"] == Scheme(bits=8)


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(ConfigError, match="no matrix"):
        plan_schemes(QuantConfig(predicate=lambda path, shape: False), SHAPES)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "int4"}, "unknown quantization mode"),
        ({"bits": 7}, "bits: mode affine has"),
        ({"mode": "balanced", "bits": 4}, "bits: mode balanced has 2"),
        ({"group_size": 16}, "group_size"),
        ({"mode": "nvfp4", "group_size": 32}, "group_size"),
        ({"recipe": "pear"}, "unknown recipe"),
        ({"recipe": "apple", "bits": 2}, "recipe apple already sets bits"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        QuantConfig(**settings)


@pytest.mark.parametrize("mode", BITS)
def test_an_entry_of_config_json_is_read_back(mode):
    for bits in BITS[mode]:
        for group_size in GROUP_SIZES[mode]:
            scheme = Scheme(mode=mode, bits=bits, group_size=group_size)
            assert parse_scheme(scheme.to_dict(), where="test") == scheme
    assert parse_scheme({"group_size": 64, "bits": 4}, where="test") == Scheme()


@pytest.mark.parametrize(
    "entry", [None, [], {}, {"bits": 4}, {"bits": 9, "group_size": 64}, {"bits": "4", "group_size": 64}]
)
def test_a_damaged_entry_is_refused(entry):
    with pytest.raises(ConfigError):
        parse_scheme(entry, where="config.json")


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_the_usual_sizes_of_a_mode_are_those_of_mlx(mode):
    quantized = mx.quantize(mx.ones((64, 256)), mode=mode)
    arrays = Scheme(mode=mode).arrays(64, 256, "float32").values()
    assert [(f"mlx.core.{dtype}", shape) for dtype, shape in arrays] == [(str(a.dtype), a.shape) for a in quantized]


def test_bytes_are_those_of_the_arrays():
    assert Scheme(bits=4).nbytes(128, 256, "bfloat16") == 128 * 256 // 2 + 2 * 128 * 4 * 2
    assert Scheme(mode="balanced").nbytes(128, 256, "bfloat16") == 128 * 256 // 4 + 128 * 4
    assert Scheme(mode="nvfp4").nbytes(128, 256, "float32") == 128 * 256 // 2 + 128 * 16
