"""The trainer's side of weights over HTTP: streams of buckets that the workers of a server fetch,
and the meetings at which these and the trainer tell each other how to reach them."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from hmac import compare_digest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .http import STALL_S, hang_up_after, patience_s
from .meeting import LARGEST, Meeting
from .pack import Packed

REQUEST_S = 10.0  # that a client may take to say what it wants
MOST_CLIENTS = 256  # at a time; every worker of a server is one


class Over(Exception):
    """Nobody takes the buckets of this update any more."""


class BucketServer:
    """Serves one update and one meeting at a time, at paths that cannot be guessed, to the workers
    of a server.

    `host`: address of this machine at which the workers reach it; it listens on no other.
    """

    def __init__(self, host: str):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = _Server((host, 0), family)
        self.address = str(self._server.server_address[0])
        name = f"[{self.address}]" if ":" in self.address else self.address
        self._url = f"http://{name}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @contextmanager
    def stream(self, num_workers: int) -> Iterator[BucketStream]:
        """Buckets of one update, for so many workers, while the block lasts."""
        folder = f"/{secrets.token_urlsafe(32)}"
        stream = BucketStream(folder, self._url, num_workers)
        self._server.stream = stream
        try:
            yield stream
        finally:
            self._server.stream = None
            stream.close()

    @contextmanager
    def meeting(self, limit_s: float) -> Iterator[tuple[str, Meeting]]:
        """(URL, what is said at it) of a meeting, while the block lasts."""
        folder, meeting = f"/{secrets.token_urlsafe(32)}", Meeting(limit_s)
        self._server.meeting = (folder, meeting)
        try:
            yield f"{self._url}{folder}/0", meeting
        finally:
            self._server.meeting = None
            meeting.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class BucketStream:
    """Buckets at numbered paths, one after another, each until all workers have read it."""

    def __init__(self, folder: str, url: str, num_workers: int):
        self.folder, self._num_workers = folder, num_workers
        self.request = {"url": f"{url}{folder}/0"}  # by which a server is asked to take them
        self._changed = threading.Condition()
        self._number, self._bucket, self._times_read = -1, None, 0
        self._is_whole, self._is_over = False, False

    def put(self, bucket: Packed) -> None:
        """Return when all have read the one before, and this one can be. Raises Over."""
        with self._changed:
            self._changed.wait_for(self._is_free, STALL_S)
            if self._is_over or not self._is_free():
                raise Over
            self._number, self._bucket, self._times_read = self._number + 1, bucket, 0
            self._changed.notify_all()

    def _is_free(self) -> bool:
        return self._is_over or self._number < 0 or self._times_read >= self._num_workers

    def end(self) -> None:
        """No more come."""
        with self._changed:
            self._is_whole = True
            self._changed.notify_all()

    def close(self) -> None:
        """Give up what has not been read: whoever waits is turned away."""
        with self._changed:
            self._is_over, self._bucket = True, None
            self._changed.notify_all()

    def wait_for(self, path: str) -> Packed | None:
        """The bucket there, as soon as there is one; None: no more come. LookupError for a path
        that no longer leads to one, or does not within STALL_S."""
        with self._changed:
            number = self._number
            if path == f"{self.folder}/{number + 1}":
                self._changed.wait_for(
                    lambda: self._number > number or self._is_whole or self._is_over, STALL_S
                )
                if self._is_whole and self._number == number:
                    return None
                number += 1
            if self._is_over or number != self._number or path != f"{self.folder}/{number}":
                raise LookupError(path)
            assert self._bucket is not None
            return self._bucket

    def was_read(self, bucket: Packed) -> None:
        with self._changed:
            self._times_read += bucket is self._bucket
            self._changed.notify_all()


class _Server(ThreadingHTTPServer):
    def __init__(self, address: tuple[str, int], family: socket.AddressFamily):
        self.address_family = family
        self.stream: BucketStream | None = None
        self.meeting: tuple[str, Meeting] | None = None
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

    _answer: Callable[[], None] | None = None

    def handle(self) -> None:
        with hang_up_after(self.connection, REQUEST_S):
            super().handle()
        if self._answer is not None:  # which may wait for what was asked
            self._answer()

    def do_GET(self) -> None:
        stream, meeting = self.server.stream, self.server.meeting
        folder, _, name = self.path.rpartition("/")
        if stream is not None and _same(folder, stream.folder):
            self._answer = partial(self._send_bucket, stream)
        elif meeting is not None and _same(folder, meeting[0]):
            self._answer = partial(self._send_said, meeting[1], name)
        else:
            self.send_error(404)

    def do_PUT(self) -> None:
        """Something to say at the meeting."""
        meeting, size = self.server.meeting, self.headers.get("Content-Length", "")
        folder, _, name = self.path.rpartition("/")
        if meeting is None or not _same(folder, meeting[0]):
            self.send_error(404)
        elif not size.isascii() or not size.isdigit() or int(size) > LARGEST:
            self.send_error(413)
        else:
            with suppress(ValueError):
                meeting[1].set(bytes.fromhex(name).decode(), self.rfile.read(int(size)))
                self._send(200, b"")
                return
            self.send_error(400)

    def _send_bucket(self, stream: BucketStream) -> None:
        try:
            bucket = stream.wait_for(self.path)
        except LookupError:
            self.send_error(404)
            return
        if bucket is None:
            self.send_response(204)
            self.end_headers()
            return
        with hang_up_after(self.connection, patience_s(bucket.nbytes)):
            self._send(200, bucket.header, bucket.data.numpy().data)
        stream.was_read(bucket)

    def _send_said(self, meeting: Meeting, name: str) -> None:
        try:
            said = meeting.get(bytes.fromhex(name).decode())
        except (ValueError, TimeoutError):
            self.send_error(404)
            return
        with hang_up_after(self.connection, patience_s(len(said))):
            self._send(200, said)

    def _send(self, status: int, *parts: Any) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(sum(map(len, parts))))
        self.end_headers()
        for part in parts:
            self.wfile.write(part)

    def log_message(self, format: str, *args: Any) -> None:
        return  # by default it writes every request to stderr


def _same(path: str, secret: str) -> bool:
    return compare_digest(path.encode(), secret.encode())
