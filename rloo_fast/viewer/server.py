"""The page over HTTP, on this machine alone.

Only 127.0.0.1 is listened on, only GET and HEAD are answered, and only to a browser that means this
address: another site cannot read a run by a name that it points here (DNS rebinding). The page may
load nothing from elsewhere, and run no script but its own.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from .answers import Unknown, answer
from .pages import ASSETS, CONTENT_TYPES
from .run import Run

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
OWN_NAMES = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?")  # any port: it may be forwarded
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LEAST_GZIPPED = 2000  # bytes


class Server(ThreadingHTTPServer):
    """Serves `runs`; port 0: a free one. OSError where the port is taken."""

    daemon_threads = True

    def __init__(self, runs: Sequence[Run], port: int = 0):
        self.runs = runs
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "rloo-fast", ""

    def do_GET(self) -> None:
        if not OWN_NAMES.fullmatch(self.headers.get("Host", "")):
            return self._send(HTTPStatus.FORBIDDEN, b"This page is for 127.0.0.1 only.", "txt")
        url = urlsplit(self.path)
        if url.path.startswith("/api/"):
            return self._answer(url.path.removeprefix("/api/"), dict(parse_qsl(url.query)))
        name = "index.html" if url.path == "/" else url.path.removeprefix("/assets/")
        if name not in ASSETS:
            return self._send(HTTPStatus.NOT_FOUND, b"There is no such page.", "txt")
        self._send(HTTPStatus.OK, ASSETS[name].read_bytes(), name.rpartition(".")[2])

    do_HEAD = do_GET

    def _answer(self, path: str, query: dict[str, str]) -> None:
        try:
            found, status = answer(self.server.runs, path, query), HTTPStatus.OK
        except Unknown:
            found, status = {"error": f"there is no {path[:40]!r}"}, HTTPStatus.NOT_FOUND
        except ValueError as error:
            found, status = {"error": str(error)}, HTTPStatus.BAD_REQUEST
        except OSError as error:  # a file that was dropped while it was read
            found, status = {"error": str(error)}, HTTPStatus.SERVICE_UNAVAILABLE
        self._send(status, json.dumps(found, allow_nan=False).encode(), "json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        if "gzip" in self.headers.get("Accept-Encoding", "") and len(body) >= LEAST_GZIPPED:
            body = gzip.compress(body, 1)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", CONTENT_TYPES[kind])
        self.send_header("Content-Length", str(len(body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
