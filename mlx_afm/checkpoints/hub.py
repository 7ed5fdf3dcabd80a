"""Paths that are Hugging Face repository ids: downloaded once, read from the cache ever after."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_afm.errors import FormatError
from mlx_afm.files import to_path

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "base_adapter/*", "toolkit/*"]


def resolve(path: str | Path) -> Path:
    """A local path as it is; a repository id (`owner/name`) as its folder in the local cache.

    What exists on disk is never looked up. Offline, the cache alone is used.

    Raises:
        FormatError: the repository cannot be had.
    """
    local = to_path(path)
    if local.exists() or not REPOSITORY.fullmatch(str(path)):
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(str(path), allow_patterns=WANTED))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        expected = "a folder on this disk, or a repository that can be downloaded"
        raise FormatError(f"no such folder, and no repository: {reason:.200}", where=path, expected=expected) from error
