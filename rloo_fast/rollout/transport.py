"""HTTP between the trainer and a rollout server: questions there, buckets of weights from here."""

from __future__ import annotations

import json
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import safetensors.torch
import torch

from .engine import Bucket, EngineError

BACKEND = "rloo_fast"  # vLLM's name for this way of transferring weights
PROTOCOL = 1  # of the two ends; they may be installed on different machines


class ServerGone(EngineError):
    """The server cannot be reached, or hung up before it answered."""


class Refused(EngineError):
    """The server answered with an error: `status`, and its own words as the message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Endpoint:
    """JSON questions to one server, from any number of threads.

    `connect_s`: longest to wait for a connection. An answer may take as long as it likes, while
    the server's host is alive.
    """

    def __init__(self, base_url: str, connect_s: float):
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ValueError(
                "a server's address is like http://localhost:8000, with http:// or https:// in "
                f"front, got {base_url!r}."
            )
        self.base_url, self.connect_s = base_url.rstrip("/"), connect_s
        self._connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/")
        self._open: set[HTTPConnection] = set()

    def get(self, path: str) -> dict[str, Any]:
        return self._ask("GET", path, None)

    def post(self, path: str, **fields: Any) -> dict[str, Any]:
        return self._ask("POST", path, json.dumps(fields))

    def local_address(self) -> str:
        """The address of this machine on the network that leads to the server."""
        connection = self._connect(self._host, self._port, timeout=self.connect_s)
        connection.connect()
        address = connection.sock.getsockname()[0]
        connection.close()
        return address

    def hang_up(self) -> None:
        """End every question under way; who asked gets ServerGone. The server drops its work."""
        for connection in list(self._open):
            with suppress(OSError, AttributeError):  # it is not connected yet, or no longer
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _ask(self, method: str, path: str, body: str | None) -> dict[str, Any]:
        connection = self._connect(self._host, self._port, timeout=self.connect_s)
        self._open.add(connection)
        try:
            connection.connect()
            _wait_while_host_lives(connection.sock)
            # a connection each: one that is kept may be closed by the server just when it is reused
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request(method, self._path + path, body, headers)
            response = connection.getresponse()
            answer = response.read().decode()
        except (OSError, HTTPException) as error:
            raise ServerGone(f"{type(error).__name__}: {error}") from error
        finally:
            self._open.discard(connection)
            connection.close()
        if response.status != 200:
            raise Refused(response.status, _message(answer))
        return json.loads(answer or "{}")


def _wait_while_host_lives(sock: socket.socket) -> None:
    """No time limit, but fail two minutes after the other machine has gone without a word."""
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):  # not on macOS
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _message(answer: str) -> str:
    """The sentence in an error answer, whichever of the usual forms it has."""
    try:
        error = json.loads(answer)
        return str(error["error"]["message"] if "error" in error else error["detail"])
    except (ValueError, KeyError, TypeError):
        return answer[:500]


class BucketServer:
    """Offers one bucket at a time, at a path that cannot be guessed, to the workers of a server.

    `host`: address of this machine at which the workers reach it.
    """

    def __init__(self, host: str):
        self._offered: dict[str, bytes] = {}
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server_class = type("_Server", (ThreadingHTTPServer,), {"address_family": family})
        handler = type("_Handler", (_Handler,), {"offered": self._offered})
        self._server = server_class((host, 0), handler)
        name = f"[{host}]" if ":" in host else host
        self._address = f"http://{name}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def new_folder(self) -> str:
        """Where the buckets of one update lie: the workers take one update from one folder."""
        return f"/{secrets.token_urlsafe(32)}"

    @contextmanager
    def offer(self, path: str, bucket: Bucket) -> Iterator[str]:
        """The bucket's URL, while the block lasts: every worker of the server fetches it."""
        self._offered[path] = _as_safetensors(bucket)
        try:
            yield self._address + path
        finally:
            del self._offered[path]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _as_safetensors(bucket: Bucket) -> bytes:
    # copies: safetensors takes neither views nor two names of one memory
    to_host = {"device": "cpu", "copy": True, "memory_format": torch.contiguous_format}
    return safetensors.torch.save({name: t.detach().to(**to_host) for name, t in bucket})


class _Handler(BaseHTTPRequestHandler):
    offered: dict[str, bytes]

    def do_GET(self) -> None:
        blob = self.offered.get(self.path)
        if blob is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(blob)))
        self.end_headers()
        self.wfile.write(blob)

    def log_message(self, format: str, *args: Any) -> None:
        return  # by default it writes every request to stderr
