import json
import shlex
from pathlib import Path

import pytest

from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.formats.asset_pack import AssetPack, repair_manifest

IDENTIFIER = "fmadapter-box-9799725"


def pack(**settings):
    return AssetPack(package=Path("out/box.fmadapter"), identifier=IDENTIFIER, **settings)


def test_a_pack_on_demand():
    made = pack(platforms=("iOS",))
    assert made.manifest == {
        "assetPackID": IDENTIFIER,
        "downloadPolicy": {"onDemand": {}},
        "fileSelectors": [{"directory": "box.fmadapter"}],
        "platforms": ["iOS"],
    }
    assert made.command_line() == (
        "xcrun ba-package foundation-models package --adapter-path out/box.fmadapter "
        f"--asset-pack-id {IDENTIFIER} --output-path out/box.aar --platforms iOS --on-demand"
    )


@pytest.mark.parametrize(
    ("policy", "events", "key", "names"),
    [
        ("PREFETCH", (), "prefetch", ["firstInstallation", "subsequentUpdate"]),
        ("PREFETCH", ("FIRST_INSTALLTION",), "prefetch", ["firstInstallation"]),
        ("ESSENTIAL", ("FIRST_INSTALLATION", "FIRST_INSTALLTION"), "essential", ["firstInstallation"]),
        ("ESSENTIAL", ("SUBSEQUENT_UPDATE",), "essential", ["subsequentUpdate"]),
    ],
)
def test_packs_that_come_with_the_app(policy, events, key, names):
    made = pack(policy=policy, events=events)
    assert made.manifest["downloadPolicy"] == {key: {"installationEventTypes": names}}
    assert made.command()[-2 - len(names) :] == [f"--{key}", "--installation-event-types", *names]
    assert made.manifest["platforms"] == ["iOS", "macOS", "visionOS"]


def test_paths_with_spaces_stay_one_word():
    made = AssetPack(package=Path("my out/box.fmadapter"), identifier=IDENTIFIER)
    assert shlex.split(made.command_line()) == made.command()


def test_the_manifest_lies_beside_the_package(tmp_path):
    made = AssetPack(package=tmp_path / "box.fmadapter", identifier=IDENTIFIER)
    assert made.write_manifest() == tmp_path / "box.manifest.json"
    assert json.loads((tmp_path / "box.manifest.json").read_text()) == made.manifest
    assert repair_manifest(tmp_path / "box.manifest.json") is False


def test_all_wrong_settings_come_together():
    with pytest.raises(ConfigError) as error:
        pack(platforms=("ios", "watchOS"), policy="LATER", events=("NOW",))
    assert len(error.value.details) == 4
    with pytest.raises(ConfigError, match="on no event"):
        pack(events=("FIRST_INSTALLTION",))
    with pytest.raises(ConfigError, match="at least one"):
        pack(platforms=())


def test_only_the_null_is_repaired(tmp_path):
    path = tmp_path / "manifest.json"
    content = {
        "assetPackID": "ü",
        "downloadPolicy": {"onDemand": None},
        "platforms": [],
        "more": [None, {"onDemand": None}],
    }
    path.write_text(json.dumps(content))
    assert repair_manifest(path) is True
    assert json.loads(path.read_text()) == {**content, "downloadPolicy": {"onDemand": {}}}
    before = path.read_bytes()
    assert repair_manifest(path) is False
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"assetPackID": "x"}', '{"assetPackID": "x", "downloadPolicy": null}',
             '{"downloadPolicy": {"onDemand": null}}', "\xff"],
)  # fmt: skip
def test_other_files_are_refused_and_stay(text, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match="manifest"):
        repair_manifest(path)
    assert path.read_bytes() == text.encode("latin-1")
