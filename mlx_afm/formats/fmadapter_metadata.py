"""`metadata.json` of an adapter package: eight keys, and what they may hold.

    adapterIdentifier                   fmadapter-NAME-<first 7 digits of the signature>
    author                              text
    baseModelSignature                  40 lower-case hex digits: the base model the adapter fits
    creatorDefined                      a free JSON object that the app can read
    description, license                text
    loraRank                            integer
    speculativeDecodingDraftTokenCount  integer, there even without a draft model

UTF-8 without a byte order mark, keys sorted at every level, 4-space indent, non-ASCII as it is, no final newline;
at most 1 MB. Reading takes any formatting, as the runtime does, passes over unknown keys, and fills in what a
package may leave out: everything but identifier, signature and rank.

A package for another model than Apple's states its sizes as {"mlx_afm": {"geometry": {...}}} in
`creatorDefined`: that place is ours, the rest is the developer's.

Source: public descriptions of the toolkit's exporter and of packages that load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_afm.errors import ConfigError, FormatError, SettingError
from mlx_afm.formats.fmadapter_plan import APPLE_GEOMETRY, Geometry

SUFFIX = ".fmadapter"
MAX_METADATA_BYTES = 1_000_000
# Toolkit 26.0.0, the only public one; a constant there, not derivable from anything.
PUBLIC_SIGNATURE = "9799725ff8e851184037110b422d891ad3b92ec1"
IDENTIFIER_FORM = re.compile(r"fmadapter-([A-Za-z0-9_]+)-([A-Za-z0-9_]+)")
SIGNATURE_FORM = re.compile(r"[0-9a-f]{40}")

# File names end at 255 bytes; atomic writing needs some of them.
_LONGEST_NAME = 200
_DEEPEST = 100
_GEOMETRY_BYTES = 1_000


def require_adapter_name(name: str) -> str:
    """The name itself, if devices take it.

    Raises:
        ConfigError: with a name that would do. Devices refuse hyphens (`invalidAdapterName`).
    """
    if isinstance(name, str) and re.fullmatch(f"[A-Za-z0-9_]{{1,{_LONGEST_NAME}}}", name):
        return name
    similar = re.sub(r"[^A-Za-z0-9]+", "_", str(name)).strip("_")[:_LONGEST_NAME]
    raise SettingError(
        "not a name that devices accept for an adapter",
        where="adapter name",
        expected=f"ASCII letters, digits and underscores, at most {_LONGEST_NAME}",
        found=f"{name!r:.80}",
        advice=f"Hyphens, spaces and dots fail on the device; use e.g. {similar or 'my_adapter'}",
    )


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What `metadata.json` says, except the geometry.

    Attributes:
        name: adapter name; the package is called `NAME.fmadapter`.
        signature: 40 hex digits naming the base model.
        author, description, license: free text.
        creator_defined: free JSON object, readable by the app at run time.
        rank: LoRA rank; devices are known to take 32.
        draft_token_count: tokens to draft at a time, written even without a draft model.

    Raises:
        ConfigError: a value that the runtime would refuse or JSON cannot hold, all in one error.
    """

    name: str
    signature: str = PUBLIC_SIGNATURE
    author: str = "3P developer"
    description: str = ""
    license: str = ""
    creator_defined: Mapping[str, Any] = field(default_factory=dict)
    rank: int = APPLE_GEOMETRY.rank
    draft_token_count: int = 5

    def __post_init__(self) -> None:
        require_adapter_name(self.name)
        faults = _value_faults(self) + _creator_faults(self.creator_defined)
        if not faults:
            try:
                excess = len(self.text().encode("utf-8")) + _GEOMETRY_BYTES - MAX_METADATA_BYTES
                faults += [f"{excess} bytes too long: at most {MAX_METADATA_BYTES} are allowed"] * (excess > 0)
            except UnicodeEncodeError as error:
                faults.append(f"text that is not Unicode: {error}")
        if faults:
            raise SettingError("unusable package metadata", where=self.name, details=faults)

    @property
    def identifier(self) -> str:
        """What devices call the adapter: `fmadapter-NAME-` and the first 7 digits of the signature."""
        return f"fmadapter-{self.name}-{self.signature[:7]}"

    @property
    def folder_name(self) -> str:
        """`NAME.fmadapter`."""
        return self.name + SUFFIX

    def text(self, geometry: Geometry = APPLE_GEOMETRY) -> str:
        """The canonical content of `metadata.json`."""
        creator = dict(self.creator_defined)
        if geometry != APPLE_GEOMETRY:
            creator["mlx_afm"] = {**creator.get("mlx_afm", {}), "geometry": asdict(geometry)}
        return canonical_text(
            {
                "adapterIdentifier": self.identifier,
                "author": self.author,
                "baseModelSignature": self.signature,
                "creatorDefined": creator,
                "description": self.description,
                "license": self.license,
                "loraRank": self.rank,
                "speculativeDecodingDraftTokenCount": self.draft_token_count,
            }
        )


def _value_faults(metadata: Metadata) -> list[str]:
    faults = []
    if not isinstance(metadata.signature, str) or not SIGNATURE_FORM.fullmatch(metadata.signature):
        faults.append(f"signature must be 40 lower-case hex digits, not {metadata.signature!r:.80}")
    for name in ("author", "description", "license"):
        if not isinstance(value := getattr(metadata, name), str):
            faults.append(f"{name} must be text, not {value!r:.80}")
    for name in ("rank", "draft_token_count"):
        value = getattr(metadata, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            faults.append(f"{name} must be a whole number above 0, not {value!r:.80}")
    return faults


def _creator_faults(creator: object) -> list[str]:
    if not isinstance(creator, Mapping):
        return [f"creator_defined must be a mapping, not {type(creator).__name__}"]
    ours = creator.get("mlx_afm", {})
    if not isinstance(ours, Mapping) or "geometry" in ours:
        return ["creator_defined: mlx_afm is for this library, and its geometry is filled in on writing"]
    try:
        plain = json.loads(json.dumps(dict(creator), allow_nan=False))
        if plain != creator or _depth(plain) > _DEEPEST:
            return ["creator_defined holds what JSON would change (tuples, number keys) or is nested too deeply"]
    except (TypeError, ValueError, RecursionError) as error:
        return [f"creator_defined cannot be written as JSON: {error}"]
    return []


def canonical_text(content: Mapping[str, Any]) -> str:
    """The text of `metadata.json` as the toolkit formats it."""
    return json.dumps(content, sort_keys=True, indent=4, ensure_ascii=False, allow_nan=False)


def read_metadata(path: Path) -> tuple[Metadata, Geometry]:
    """What a `metadata.json` says.

    Raises:
        FormatError: unreadable, or not what a device would take.
    """
    raw = read_metadata_bytes(path)
    try:
        content = parse_metadata(raw)
    except FormatError as error:
        raise FormatError(error.what, where=path, advice="Copy or export the package again.") from error
    try:
        metadata, geometry = _from_content(content), stated_geometry(content) or APPLE_GEOMETRY
    except KeyError as error:
        raise FormatError(f"key {error} is missing", where=path) from error
    except ConfigError as error:
        raise FormatError("unusable package metadata", where=path, details=str(error).splitlines()) from error
    if metadata.identifier != content["adapterIdentifier"]:
        found = f"{content['adapterIdentifier']!r:.80}"
        raise FormatError("wrong adapterIdentifier", where=path, expected=metadata.identifier, found=found)
    if metadata.rank != geometry.rank:
        raise FormatError("unexpected loraRank", where=path, expected=geometry.rank, found=metadata.rank)
    return metadata, geometry


def _from_content(content: dict[str, Any]) -> Metadata:
    identifier = IDENTIFIER_FORM.fullmatch(str(content["adapterIdentifier"]))
    return Metadata(
        name=identifier[1] if identifier else str(content["adapterIdentifier"]),
        signature=content["baseModelSignature"],
        author=content.get("author", ""),
        description=content.get("description", ""),
        license=content.get("license", ""),
        creator_defined=_without_geometry(content.get("creatorDefined", {})),
        rank=content["loraRank"],
        draft_token_count=content.get("speculativeDecodingDraftTokenCount", Metadata.draft_token_count),
    )


def read_metadata_bytes(path: Path) -> bytes:
    """The bytes of a `metadata.json`.

    Raises:
        FormatError: not a regular file, unreadable, or larger than `MAX_METADATA_BYTES`.
    """
    try:
        if not path.is_file():
            raise FormatError("not a regular file" if path.exists() else "no such file", where=path)
        with path.open("rb") as handle:
            raw = handle.read(MAX_METADATA_BYTES + 1)
    except OSError as error:
        raise FormatError(f"cannot be read: {error}", where=path) from error
    if len(raw) > MAX_METADATA_BYTES:
        raise FormatError(f"more than {MAX_METADATA_BYTES} bytes", where=path)
    return raw


def parse_metadata(raw: bytes) -> dict[str, Any]:
    """The JSON object in these bytes; strict about what other readers disagree on.

    Raises:
        FormatError: not UTF-8, not JSON (NaN and infinity are not), not an object, a repeated key, a lone
            surrogate, or nested too deeply.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        if not isinstance(value, dict):
            raise ValueError(f"{type(value).__name__} at the top")
        if _depth(value) > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} deep")
        canonical_text(value).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not a UTF-8 JSON object: {error!s:.200}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        boxes = [box for box in level if isinstance(box, (dict, list))]
        level = [item for box in boxes for item in (box.values() if isinstance(box, dict) else box)]
        depth += bool(boxes)
    return depth


def stated_geometry(content: Mapping[str, Any]) -> Geometry | None:
    """The geometry that a package's metadata states, or None.

    Raises:
        ConfigError: it states one that cannot be, or our place in it holds something else.
    """
    creator = content.get("creatorDefined")
    if not isinstance(creator, dict) or "mlx_afm" not in creator:
        return None
    if not isinstance(ours := creator["mlx_afm"], dict):
        raise ConfigError("creatorDefined: mlx_afm is not an object")
    return Geometry.from_dict(ours["geometry"]) if "geometry" in ours else None


def _without_geometry(creator: Any) -> Any:
    if not isinstance(creator, dict) or not isinstance(creator.get("mlx_afm"), dict):
        return creator
    ours = {key: value for key, value in creator["mlx_afm"].items() if key != "geometry"}
    rest = {key: value for key, value in creator.items() if key != "mlx_afm"}
    return {**rest, "mlx_afm": ours} if ours else rest
