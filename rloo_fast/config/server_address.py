"""The address of a rollout server, as a configuration gives it."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

EXPECTED = (
    "a rollout server's address (vllm_server_base_url, or vllm_server_host and vllm_server_port) "
    "is like http://localhost:8000, with http:// or https:// in front"
)


class ServerAddress(NamedTuple):
    host: str
    port: int | None  # None: what the scheme says
    path: str  # "" or like "/v"
    is_https: bool


def server_url(base_url: str | None, host: str, port: int) -> str:
    """`base_url`, or that of the host, which may be an IPv6 address, and the port."""
    # text: YAML may hold a number where text belongs
    host = f"[{host}]" if ":" in str(host) else host
    return str(base_url or f"http://{host}:{port}")


def read_address(url: str) -> ServerAddress:
    """Raises ValueError for what is no such address, or holds a password: addresses are logged."""
    if "@" in url or "?" in url or "#" in url:
        raise ValueError(
            f"{EXPECTED}, and without user, password or query: a key belongs in VLLM_API_KEY."
        )
    try:
        parts = urlsplit(url)
        address = ServerAddress(
            parts.hostname or "", parts.port, parts.path.rstrip("/"), parts.scheme == "https"
        )
    except ValueError as error:
        raise ValueError(f"{EXPECTED}, got {url!r}: {error}.") from None
    odd = any(not c.isprintable() or c.isspace() for c in url)
    if parts.scheme not in ("http", "https") or not address.host or odd:
        raise ValueError(f"{EXPECTED}, got {url!r}.")
    return address
