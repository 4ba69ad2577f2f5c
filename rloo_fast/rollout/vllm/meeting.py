"""Where the trainer and the workers of a server tell each other how to reach them.

It is the key-value store by which torch makes a process group. torch's own TCPStore lets anybody
who reaches its port read and write; this one is kept by the trainer's `BucketServer`, at a path
that cannot be guessed and that the server is told in a request with the key, until they have met.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from .fetch import connected, not_fetched
from .http import hang_up_after, patience_s

LARGEST = 2**16  # bytes that may be said under a name
MOST = 2**12  # names


class _Said(Store):
    """What torch asks of a store to make a group of processes, by `set` and `get`."""

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def clone(self) -> Store:
        return self


class Meeting(_Said):
    """The trainer's end. `limit_s`: how long something may take to be said."""

    def __init__(self, limit_s: float):
        super().__init__()
        self._limit_s, self._said = limit_s, dict[str, bytes]()
        self._changed, self._is_over = threading.Condition(), False

    def set(self, key: str, value: Any) -> None:
        with self._changed:
            if len(value) > LARGEST or (key not in self._said and len(self._said) >= MOST):
                raise ValueError(f"more than {MOST} names, or {LARGEST} bytes under one")
            self._said[key] = value.encode() if isinstance(value, str) else bytes(value)
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: key in self._said or self._is_over, self._limit_s)
            if key not in self._said:
                raise TimeoutError(f"nobody said {key} within {self._limit_s:.0f} s")
            return self._said[key]

    def close(self) -> None:
        """Who waits for something to be said waits no longer."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            return all(key in self._said for key in keys)

    def said(self, prefix: str) -> dict[str, bytes]:
        """All that was said under names that begin so, without this beginning."""
        with self._changed:
            found = {k: v for k, v in self._said.items() if k.startswith(prefix)}
        return {key.removeprefix(prefix): value for key, value in sorted(found.items())}


class MeetingOverHttp(_Said):
    """A worker's end. `url`, `hosts`: as in `fetch`, whose rules hold here as well.

    Raises NotFetched from the first call on for an address that is none.
    """

    def __init__(self, url: object, hosts: str, limit_s: float):
        super().__init__()
        self._url, self._hosts = url, hosts
        self._due = time.monotonic() + limit_s
        self.own_address = ""  # of this machine, on the network that leads to the trainer

    def set(self, key: str, value: Any) -> None:
        self._ask("PUT", key, value)

    def get(self, key: str) -> bytes:
        return self._ask("GET", key)

    def check(self, keys: list[str]) -> bool:
        raise NotImplementedError("a worker waits for what is said")

    def _ask(self, method: str, key: str, value: Any = None) -> bytes:
        url, left = self._url, max(1.0, self._due - time.monotonic())
        with not_fetched(url), connected(url, self._hosts) as (connection, token, _):
            self.own_address = connection.sock.getsockname()[0]
            with hang_up_after(connection.sock, min(left, patience_s(0))):
                connection.request(method, f"/{token}/{key.encode().hex()}", value)
                response = connection.getresponse()
                said = response.read(LARGEST + 1)
            if response.status != 200 or len(said) > LARGEST:
                raise ValueError(f"status {response.status}, {len(said)} bytes")
        return said
