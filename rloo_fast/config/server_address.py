"""The address of a rollout server, as a configuration gives it."""

from __future__ import annotations

from typing import Any, NamedTuple, cast
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


def server_urls(base_url: Any, host: str, port: int) -> list[str]:
    """`base_url`, one or a list, or that of the host, which may be an IPv6 address, and the port.
    Raises ValueError for a list with an address twice."""
    # text: YAML may hold a number where text belongs
    host = f"[{host}]" if ":" in str(host) else host
    given = base_url or f"http://{host}:{port}"
    many = cast(Any, given) if isinstance(given, (list, tuple)) else [given]
    urls = [str(url) for url in many]
    if len({url.rstrip("/") for url in urls}) < len(urls):
        raise ValueError(f"vllm_server_base_url names a server twice: {urls}. Write each once.")
    return urls


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
