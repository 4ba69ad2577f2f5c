"""Who may use the endpoints of `vllm serve`: whoever knows its key, or without one this machine.

vLLM asks for its key under /v1 and the like alone; those that load weights, put the server to sleep
or call its workers are open to everybody who reaches its port.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from hashlib import sha256
from hmac import compare_digest
from importlib import import_module
from typing import Any

from . import lora
from .fetch import read_hosts
from .http import BACKEND, KEY, KEY_FILE, TRAINER_HOST, api_key

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]

OPEN = {"/health", "/ping", "/version", "/metrics"}  # what orchestrators ask; no secrets there
VLLM_KEYS = ("/v1/", "/v2/", "/inference/", "/cohere/")  # where vLLM itself asks for its key
# ... and these load any adapter in place of ours, where VLLM_ALLOW_RUNTIME_LORA_UPDATING is set
ADAPTERS = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
# a browser, on behalf of some page, or a proxy, on behalf of some other machine
FOREIGN = {b"origin", b"sec-fetch-site", b"forwarded", b"via", b"x-forwarded-for", b"x-real-ip"}
REFUSAL = (
    f"the request carries no key that this server takes. Set {KEY} (or {KEY_FILE}) to the same "
    "value for server and trainer. A server without a key is controlled from its own machine alone."
)


def install() -> None:
    """Put the guard before every server that this process starts with our backend.

    Raises ImportError where this vLLM builds its servers in another way.
    """
    try:
        register: Any = import_module("vllm.entrypoints.serve.middleware.register")
        original = register.init_entrypoints_middleware
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"rloo_fast cannot guard the endpoints of this vLLM ({error}): use vLLM 0.32."
        ) from error
    if original.__module__ == __name__:  # installed before
        return

    def guarded(args: Any, app: Any, *rest: Any, **named: Any) -> None:
        original(args, app, *rest, **named)
        if _backend(args) == BACKEND:
            if getattr(args, "enable_lora", False):
                app.add_middleware(lora.Named)
            app.add_middleware(Guard, keys=_keys(args))  # the last one is the first to be asked

    register.init_entrypoints_middleware = guarded
    launcher: Any = sys.modules.get("vllm.entrypoints.launchers.app")
    if launcher is not None:  # it has imported the original by name
        launcher.init_entrypoints_middleware = guarded


def _backend(args: Any) -> str | None:
    config = getattr(args, "weight_transfer_config", None)
    return config.get("backend") if isinstance(config, dict) else getattr(config, "backend", None)


def _keys(args: Any) -> list[str]:
    """The server's keys. Raises ValueError where settings would leave it open."""
    own = api_key()
    keys = [key for key in (getattr(args, "api_key", None) or [own]) if key]
    hosts = os.environ.get(TRAINER_HOST, "")
    read_hosts(hosts)
    if hosts and not keys:
        raise ValueError(
            f"{TRAINER_HOST} lets another machine control this server: set {KEY} or {KEY_FILE}, "
            "here and for the trainer."
        )
    if not keys:
        logger.warning("%s is not set: only this machine controls the server.", KEY)
    return keys


class Guard:
    """ASGI middleware. `keys`: any of them opens everything; none: see the module."""

    def __init__(self, app: Any, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._may(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = json.dumps({"error": {"message": REFUSAL, "code": 401}}).encode()
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _may(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path") or "")
        if path in OPEN and scope.get("method") in ("GET", "HEAD"):
            return True
        if self._keys:
            return self._has_key(scope)
        is_open = path.startswith(VLLM_KEYS) and path.rstrip("/") not in ADAPTERS
        return is_open or _from_here(scope)

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = sha256(key.strip()).digest()
        known = [compare_digest(digest, own) for own in self._keys]  # all of them: in equal time
        return any(known) and scheme.lower() == b"bearer"


def _from_here(scope: Scope) -> bool:
    """Whether a program of this machine asks, and neither a browser nor a proxy for someone else.

    The Host header tells names that lead here only since their owner says so (DNS rebinding).
    """
    headers = scope["headers"]
    client, server = scope.get("client"), scope.get("server")
    if not client or not server or any(name in FOREIGN for name, _ in headers):
        return False
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    if len(hosts) != 1 or not (_is_loopback(client[0]) or client[0] == server[0]):
        return False
    host = hosts[0].rpartition(":")[0] if hosts[0].rpartition(":")[2].isdigit() else hosts[0]
    host = host.strip("[]").lower()
    own = ("localhost", "0.0.0.0", "::", server[0], socket.gethostname().lower())
    return host in own or _is_loopback(host)


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback
