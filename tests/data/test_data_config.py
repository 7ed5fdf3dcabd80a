"""Settings of the data: what is refused, all of it in one error, and what is just allowed."""

import pytest

from mlx_afm.data import DataConfig
from mlx_afm.errors import SettingError


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"data_format": "alpaka"}, "data_format: expected auto or one of .*, found alpaka"),
        ({"truncation": "cut"}, "truncation: expected one of .*, found cut"),
        ({"fields": (("promt", "q"),)}, "field: expected one of .* before =, found promt=q; is it prompt[?]"),
        ({"fields": (("prompt", "q"), ("prompt", "r"))}, "field: expected each name once, found prompt more than once"),
        ({"max_tokens": 1}, "max_tokens: expected at least 2, found 1"),
        ({"transform": "module"}, "transform: expected module:function, found 'module'"),
        ({"transform": ":function"}, "transform: expected module:function"),
        ({"system": " Be short."}, "system: expected a text without spaces around it, found ' Be short.'"),
    ],
)
def test_settings_out_of_range(settings, fault):
    with pytest.raises(SettingError, match=fault):
        DataConfig(**settings)


def test_all_faults_are_told_at_once():
    with pytest.raises(SettingError) as error:
        DataConfig(data_format="alpaka", fields=(("promt", "q"),), max_tokens=0)
    assert [fault.split(":")[0] for fault in error.value.details] == ["data_format", "field", "max_tokens"]


def test_what_is_just_allowed():
    config = DataConfig(max_tokens=2, transform="a:b", system="", fields=(("prompt", "q"), ("completion", "a")))
    assert (config.max_tokens, config.system) == (2, None)
