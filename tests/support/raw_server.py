"""An HTTP server that answers with any bytes, in any rhythm."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

Behaviour = Callable[[socket.socket], None]


def reply(body: Any, status: int = 200, length: int | None = None, **headers: str) -> bytes:
    """A response with Content-Length; `body`: bytes, or what becomes JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status} Said",
        f"Content-Length: {len(data) if length is None else length}",
        "Connection: close",
    ]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


def chat(content: Any, **message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content, **message}}]}


def says(*parts: bytes | float) -> Behaviour:
    """Bytes to send, and seconds to wait between them; then it hangs up."""

    def act(connection: socket.socket) -> None:
        for part in parts:
            if isinstance(part, bytes):
                connection.sendall(part)
            else:
                time.sleep(part)

    return act


def drips(data: bytes, every_s: float = 0.02) -> Behaviour:
    return says(*(part for byte in data for part in (bytes([byte]), every_s)))


@contextmanager
def raw_serving(behave: Callable[[int], Behaviour]) -> Iterator[tuple[str, list[bytes]]]:
    """(address, requests so far) of a server that meets request n with `behave(n)`, and then closes
    the connection."""
    listening = socket.create_server(("127.0.0.1", 0))
    requests: list[bytes] = []
    stopped = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(5.0)
            got = b""
            while b"\r\n\r\n" not in got:
                got += connection.recv(65536) or b"\r\n\r\n"
            head, _, body = got.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            while len(body) < length:
                body += connection.recv(65536)
            requests.append(head + b"\r\n\r\n" + body)
            behave(len(requests) - 1)(connection)

    def accept() -> None:
        while not stopped.is_set():
            with suppress(OSError):
                threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", requests
    finally:
        stopped.set()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(5.0)
