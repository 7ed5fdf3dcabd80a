"""The draft pair from the user's toolkit folder and a draft checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_afm.checkpoints.arrays import cast
from mlx_afm.errors import FormatError
from mlx_afm.files import read_json, to_path
from mlx_afm.formats.draft_pair import PROGRAM_FILE, DraftPair, spec_tensors
from mlx_afm.formats.draft_spec import parse_spec
from mlx_afm.formats.torch_file import read_torch
from mlx_afm.model import parse_toolkit_config
from mlx_afm.tree import require_unwrapped

TEMPLATE_FILE, SPEC_FILE, CONFIG_FILE = "weights_template.bin", "checkpoint_spec.yaml", "draft-model-config.json"
ASSETS = (PROGRAM_FILE, TEMPLATE_FILE, SPEC_FILE, CONFIG_FILE)
MAX_SPEC_BYTES = 4 << 20


def open_draft_pair(toolkit: str | Path, checkpoint: str | Path, *, ignore_surplus: bool = False) -> DraftPair:
    """A draft pair that was found to fit together; its `write` puts it into a package.

    Args:
        toolkit: the toolkit's folder, or its assets.
        checkpoint: a draft checkpoint, such as `draft-model-final.pt`.
        ignore_surplus: leave tensors that the spec does not name out, as the toolkit does.

    Raises:
        FormatError: an asset is missing or damaged, or they and the checkpoint do not fit together.
        ConfigError: a draft model that is not AFM text v7.
    """
    toolkit = to_path(toolkit)
    checkpoint = to_path(checkpoint)
    assets = find_draft_assets(toolkit)
    model = parse_toolkit_config(read_json(assets / CONFIG_FILE), where=assets / CONFIG_FILE).model
    tensors = read_torch(checkpoint)
    require_unwrapped(tensors, where=checkpoint)
    state = {name: cast(tensor, "float32") for name, tensor in tensors.items()}
    named = spec_tensors(state, heads=model.num_heads, kv_heads=model.num_kv_heads, where=checkpoint)
    spec = parse_spec(read_yaml(assets / SPEC_FILE), where=assets / SPEC_FILE)
    return DraftPair(assets / PROGRAM_FILE, assets / TEMPLATE_FILE, spec, named).checked(ignore_surplus=ignore_surplus)


def find_draft_assets(toolkit: Path) -> Path:
    """The folder of the draft assets.

    Raises:
        FormatError: an asset is missing.
    """
    folders = [folder for folder in (toolkit, toolkit / "assets") if (folder / PROGRAM_FILE).is_file()]
    folder = folders[0] if folders else toolkit
    missing = [name for name in ASSETS if not (folder / name).is_file()]
    if missing:
        advice = "Give the toolkit's folder, or its assets."
        raise FormatError(f"missing {', '.join(missing)}", where=folder, advice=advice)
    return folder


def read_yaml(path: Path) -> Any:
    """The plain value in a YAML file: no tags, no aliases, no key twice.

    Raises:
        FormatError: anything else, or more than `MAX_SPEC_BYTES`.
    """
    import yaml

    if path.stat().st_size > MAX_SPEC_BYTES:
        raise FormatError(f"more than {MAX_SPEC_BYTES} bytes", where=path)
    try:
        text = path.read_bytes().decode("utf-8")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise FormatError("an alias", where=_place(path, event.start_mark), expected="plain values")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _require_unique_keys(node, path)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"not YAML: {str(error).splitlines()[0]:.200}", where=path) from error


def _require_unique_keys(root: Any, path: Path) -> None:
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if getattr(node, "id", None) == "sequence":
            nodes += node.value
        elif getattr(node, "id", None) == "mapping":
            keys = [key.value for key, _ in node.value if key.id == "scalar"]
            if len(set(keys)) != len(keys):
                raise FormatError("a key occurs twice", where=_place(path, node.start_mark))
            nodes += [value for _, value in node.value]


def _place(path: Path, mark: Any) -> str:
    return str(path) if mark is None else f"{path} line {mark.line + 1}"
