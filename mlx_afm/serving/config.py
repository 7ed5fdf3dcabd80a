"""Settings of the server, with their defaults and nowhere else."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_afm.data.config import CONTEXT_TOKENS
from mlx_afm.errors import SettingError
from mlx_afm.files import set_paths
from mlx_afm.text.system_prompt import system_fault

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What the server listens on, and the limits of everything a client can make it do.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        api_key: what clients must send as `Authorization: Bearer`; needed unless `host` is this machine alone.
        model_id: what the base is called; the name of its folder, or its hub id, if None.
        max_tokens: of an answer whose request does not say.
        temperature: of a request that does not say; 0 is greedy.
        system: system prompt of conversations without a system message, whatever the model id; "" for no system
            turn. None: for an adapter the one it was trained with, else the model's own.
        context_tokens: of prompt and answer together.
        rows: answers that are generated at the same time.
        batch_size: rows in one forward pass, whatever their LoRA adapters. With 1 nothing that others ask can
            change a single bit of an answer; more is faster, and equal but for rounding.
        prefill_tokens: of one prompt that are computed between two tokens of the answers under way.
        kv_bits: 8 holds keys and values in int8, see `GenerateConfig`.
        draft_model: MLX folder of a draft model, or its hub id, which proposes tokens to all answers; None for none.
        num_draft_tokens: proposed in each round; None adapts the number to what is accepted and to measured times.
        adapter_bytes: adapters in memory at the same time, in their inference form.
        prefix_bytes: keys and values of prompts' beginnings that are kept for later requests; 0 keeps none.
        queue: requests that may wait. Beyond that they are refused with 429.
        connections: open at the same time.
        body_bytes: of a request.
        header_seconds, body_seconds: for a request's head and body to arrive.
        idle_seconds: that a connection may stay open without a request.
        request_seconds: from the request to the end of its answer.
        grace_seconds: that running requests have to finish when the server is told to stop.
        admin_roots: folders below which adapters may be added at run time; none switches that off.
        allow_origins: web pages, such as "https://app.example", that may read answers; by CORS.
        strict_turns: refuse conversations with two turns of one role in a row, or a system message that is not the
            first; else these are joined, see `parse_messages`.
        docs: show the OpenAPI page at /docs.
        page: show the page for people at /.

    Raises:
        SettingError: settings out of range, or open to the network without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    model_id: str | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    system: str | None = None
    context_tokens: int = CONTEXT_TOKENS
    rows: int = 8
    batch_size: int = 8
    prefill_tokens: int = 512
    kv_bits: int | None = None
    draft_model: Path | None = None
    num_draft_tokens: int | None = 5
    adapter_bytes: int = 10**9
    prefix_bytes: int = 256 * 10**6
    queue: int = 64
    connections: int = 256
    body_bytes: int = 10**6
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    request_seconds: float = 300.0
    grace_seconds: float = 30.0
    admin_roots: tuple[Path, ...] = ()
    allow_origins: tuple[str, ...] = ()
    strict_turns: bool = False
    docs: bool = True
    page: bool = True

    def __post_init__(self) -> None:
        set_paths(self, "admin_roots", "draft_model")
        faults = list(self._faults())
        if faults:
            raise SettingError("the server's settings cannot be used", details=faults)

    def _faults(self) -> Iterator[str]:
        least = {"port": 0, "adapter_bytes": 0, "prefix_bytes": 0, "queue": 0, "grace_seconds": 0}
        whole = ("max_tokens", "context_tokens", "rows", "batch_size", "prefill_tokens", "connections", "body_bytes")
        for name in (*least, *whole):
            if getattr(self, name) < least.get(name, 1):
                yield f"{name}: expected at least {least.get(name, 1)}, found {getattr(self, name)}"
        for name in ("header_seconds", "body_seconds", "idle_seconds", "request_seconds"):
            if not getattr(self, name) > 0:
                yield f"{name}: expected more than 0, found {getattr(self, name)}"
        if (fault := system_fault(self.system)) is not None:
            yield f"system: {fault}"
        if self.context_tokens > CONTEXT_TOKENS:
            yield f"context_tokens: expected at most {CONTEXT_TOKENS}, found {self.context_tokens}"
        if self.port > 65535:
            yield f"port: expected at most 65535, found {self.port}"
        if not 0 <= self.temperature <= 2:
            yield f"temperature: expected from 0 to 2, found {self.temperature}"
        if self.num_draft_tokens is not None and self.num_draft_tokens < 1:
            yield f"num_draft_tokens: expected at least 1, or None to adapt, found {self.num_draft_tokens}"
        if self.kv_bits not in (None, 8):
            yield f"kv_bits: expected 8 or none, found {self.kv_bits}"
        if self.api_key is not None and (len(self.api_key) < 8 or not re.fullmatch(r"[!-~]+", self.api_key)):
            yield "api_key: expected at least 8 visible ASCII characters"
        for root in self.admin_roots:
            if not root.is_dir():
                yield f"admin_roots: expected folders, found {root}"
        for origin in self.allow_origins:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*]+", origin):
                yield f"allow_origins: expected origins such as https://app.example, found {origin}"
        if self.api_key is None and not is_loopback(self.host):
            yield f"host: {self.host} can be reached by others; expected an api_key with it (--api-key)"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
