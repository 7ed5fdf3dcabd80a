"""Asset packs: how a package reaches devices through Background Assets, as a manifest and as a command.

The manifest of a pack is a JSON object::

    {
      "assetPackID": "fmadapter-NAME-9799725",            the adapter's identifier
      "downloadPolicy": {"onDemand": {}},                 or essential / prefetch with installationEventTypes
      "fileSelectors": [{"directory": "NAME.fmadapter"}],
      "platforms": ["iOS"]
    }

Only `xcrun ba-package foundation-models package` (a Mac with Xcode) makes packs that devices recognise as adapters; it
writes the manifest itself, and for packs on demand writes `"onDemand": null`, which is refused on upload (ITMS-91140):
`repair_manifest` makes it `{}`.

Source: Apple's documentation of managed asset packs; public reports of the command and of the fault.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_afm.errors import FormatError, SettingError
from mlx_afm.files import read_json, set_paths, to_path, write_json
from mlx_afm.formats.fmadapter_metadata import SUFFIX

PLATFORMS = ("iOS", "macOS", "visionOS")
# The toolkit's spelling -> the manifest's.
POLICIES = {"ESSENTIAL": "essential", "PREFETCH": "prefetch", "ON_DEMAND": "onDemand"}
EVENTS = {
    "FIRST_INSTALLTION": "firstInstallation",  # so spelled there
    "FIRST_INSTALLATION": "firstInstallation",
    "SUBSEQUENT_UPDATE": "subsequentUpdate",
}
_FLAGS = {"ESSENTIAL": "--essential", "PREFETCH": "--prefetch", "ON_DEMAND": "--on-demand"}


@dataclass(frozen=True, kw_only=True)
class AssetPack:
    """A pack to be made of a package.

    Attributes:
        package: `.../NAME.fmadapter`.
        identifier: the adapter's identifier, which is the pack's id.
        platforms: some of `PLATFORMS`.
        policy: when devices download it, a key of `POLICIES`.
        events: with ESSENTIAL and PREFETCH, on which installations: keys of `EVENTS`; none means all.

    Raises:
        ConfigError: unknown names, or events of a pack on demand; all in one error.
    """

    package: Path
    identifier: str
    platforms: tuple[str, ...] = PLATFORMS
    policy: str = "ON_DEMAND"
    events: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        set_paths(self, "package")
        faults = [f"platforms: expected some of {', '.join(PLATFORMS)}, found {name!r}"
                  for name in self.platforms if name not in PLATFORMS]  # fmt: skip
        faults += [f"installation event type: expected some of {', '.join(EVENTS)}, found {name!r}"
                   for name in self.events if name not in EVENTS]  # fmt: skip
        if not self.platforms:
            faults.append("platforms: expected at least one")
        if self.policy not in POLICIES:
            faults.append(f"download policy: expected one of {', '.join(POLICIES)}, found {self.policy!r}")
        elif self.policy == "ON_DEMAND" and self.events:
            faults.append("installation event type: a pack on demand is downloaded when the app asks, on no event")
        if faults:
            raise SettingError("not an asset pack that could be made", where=self.package, details=faults)

    @property
    def event_names(self) -> list[str]:
        """The installations on which it is downloaded, as the manifest spells them."""
        if self.policy == "ON_DEMAND":
            return []
        return list(dict.fromkeys(EVENTS[name] for name in self.events or EVENTS))

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of the manifest."""
        policy = {"installationEventTypes": self.event_names} if self.event_names else {}
        return {
            "assetPackID": self.identifier,
            "downloadPolicy": {POLICIES[self.policy]: policy},
            "fileSelectors": [{"directory": self.package.name}],
            "platforms": list(self.platforms),
        }

    @property
    def archive(self) -> Path:
        """`NAME.aar`, beside the package."""
        return self.package.with_name(self.package.name.removesuffix(SUFFIX) + ".aar")

    def command(self, output: Path | None = None) -> list[str]:
        """The command that makes it, on a Mac with Xcode."""
        events = ["--installation-event-types", *self.event_names] if self.event_names else []
        return [
            *("xcrun", "ba-package", "foundation-models", "package"),
            *("--adapter-path", str(self.package)),
            *("--asset-pack-id", self.identifier),
            *("--output-path", str(output or self.archive)),
            *("--platforms", *self.platforms),
            _FLAGS[self.policy],
            *events,
        ]

    def command_line(self, output: Path | None = None) -> str:
        """The same as one line for a shell."""
        return shlex.join(self.command(output))

    def write_manifest(self) -> Path:
        """Writes `NAME.manifest.json` beside the package; returns where."""
        path = self.archive.with_suffix(".manifest.json")
        write_json(path, self.manifest)
        return path


def repair_manifest(path: str | Path) -> bool:
    """Makes `"onDemand": null` in a manifest `"onDemand": {}`; returns whether there was anything to repair.

    Raises:
        FormatError: no manifest of an asset pack.
    """
    path = to_path(path)
    content = read_json(path)
    policy = content.get("downloadPolicy") if isinstance(content, dict) else None
    if not isinstance(policy, dict) or "assetPackID" not in content:
        found = json.dumps(content)[:80]
        raise FormatError(
            "not an asset pack's manifest", where=path, expected="assetPackID, downloadPolicy", found=found
        )
    if "onDemand" not in policy or policy["onDemand"] is not None:
        return False
    policy["onDemand"] = {}
    write_json(path, content)
    return True
