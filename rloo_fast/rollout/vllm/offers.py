"""The trainer's side of weights over HTTP: buckets that the workers of a server fetch."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hmac import compare_digest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .http import hang_up_after, patience_s
from .pack import Packed

REQUEST_S = 10.0  # that a client may take to say what it wants
MOST_CLIENTS = 256  # at a time; every worker of a server is one


class BucketServer:
    """Serves one bucket at a time, at a path that cannot be guessed, to the workers of a server.

    `host`: address of this machine at which the workers reach it; it listens on no other.
    """

    def __init__(self, host: str):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = _Server((host, 0), family)
        self.address = str(self._server.server_address[0])
        name = f"[{self.address}]" if ":" in self.address else self.address
        self._url = f"http://{name}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def new_folder(self) -> str:
        """Where the buckets of one update lie: the workers take one update from one folder."""
        return f"/{secrets.token_urlsafe(32)}"

    @contextmanager
    def offer(self, path: str, bucket: Packed) -> Iterator[str]:
        """The bucket's URL, while the block lasts: every worker of the server fetches it."""
        self._server.offered = (path, bucket)
        try:
            yield self._url + path
        finally:
            self._server.offered = None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    def __init__(self, address: tuple[str, int], family: socket.AddressFamily):
        self.address_family = family
        self.offered: tuple[str, Packed] | None = None  # path, body
        self.clients = threading.BoundedSemaphore(MOST_CLIENTS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.clients.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.clients.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # a client hung up, or was hung up on: what that means, the server's answer says


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "rloo_fast", ""

    _body: Packed | None = None

    def handle(self) -> None:
        with hang_up_after(self.connection, REQUEST_S):
            super().handle()
        if self._body is not None:
            with hang_up_after(self.connection, patience_s(self._body.nbytes)):
                self.wfile.write(self._body.header)
                self.wfile.write(self._body.data.numpy().data)

    def do_GET(self) -> None:
        offered = self.server.offered
        if offered is None or not compare_digest(self.path.encode(), offered[0].encode()):
            self.send_error(404)
            return
        self._body = offered[1]
        self.send_response(200)
        self.send_header("Content-Length", str(self._body.nbytes))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        return  # by default it writes every request to stderr
