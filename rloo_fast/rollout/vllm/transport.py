"""JSON requests over HTTP from the trainer to a rollout server."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from errno import EMFILE, ENFILE
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, NoReturn

from ...config.server_address import read_address
from ..engine import EngineError
from .http import KEY, KEY_FILE, hang_up_after
from .watch import Watch

CONTROL_S = 600.0  # longest that the server may take for what is no completion
HEALTH_S = 60.0  # ... that it may take to say that it is well
BODY_S = 120.0  # longest from an answer's first byte to its last
MOST_BYTES = 16 * 2**20  # of an answer, unless the caller expects more
SHOWN = 500  # characters of what a server says


class ServerGone(EngineError):
    """The server cannot be reached, or hung up before it answered."""


class Refused(EngineError):
    """The server answered with an error: `status`, and its own words as the message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class OutOfFiles(EngineError):
    """This process may open no more connections, which says nothing of the server."""


class Endpoint:
    """JSON requests to one server, from any number of threads; none is ever sent twice.

    `connect_s`: longest to wait for a connection. `key`: sent with every request, and to nobody
    else: redirects are not followed, and no proxy is asked.
    """

    def __init__(self, base_url: str, connect_s: float, key: str | None = None):
        self._host, self._port, self._path, is_https = read_address(base_url)
        self.base_url, self.connect_s = base_url.rstrip("/"), connect_s
        self._connect = HTTPSConnection if is_https else HTTPConnection
        self._key, self.has_key = key, key is not None
        self._open: set[HTTPConnection] = set()
        self._watch = Watch(self._answers)

    def get(self, path: str, wait_s: float = CONTROL_S) -> dict[str, Any]:
        return self._ask("GET", path, None, wait_s, MOST_BYTES)

    def post(self, path: str, **fields: Any) -> dict[str, Any]:
        return self.ask(path, fields, wait_s=CONTROL_S)

    def ask(
        self,
        path: str,
        fields: dict[str, Any],
        *,
        wait_s: float | None = None,
        most_bytes: int = MOST_BYTES,
    ) -> dict[str, Any]:
        """The answer, a JSON object. `wait_s`: longest until it begins; None: for as long as the
        server answers other questions (`Watch`). Raises ServerGone, Refused, or EngineError for
        what is no answer.
        """
        return self._ask("POST", path, json.dumps(fields), wait_s, most_bytes)

    def local_address(self) -> str:
        """The address of this machine on the network that leads to the server."""
        connection = self._connect(self._host, self._port, timeout=self.connect_s)
        connection.connect()
        address = connection.sock.getsockname()[0]
        connection.close()
        return address

    def hang_up(self) -> None:
        """Abort every open request: its caller gets ServerGone, and the server drops the work."""
        hung_up, self._open = self._open, set()
        for connection in list(hung_up):
            with suppress(OSError, AttributeError):  # it is no longer connected, or not yet: _ask
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _answers(self) -> bool:
        try:
            self.get("/health", HEALTH_S)
        except Refused:
            return True  # an engine that is dead ends what it was asked by itself
        except OutOfFiles:
            return True  # nobody asked it
        except EngineError:
            return False
        return True

    def _ask(
        self, method: str, path: str, body: str | None, wait_s: float | None, most_bytes: int
    ) -> dict[str, Any]:
        # a connection each: one that is kept may be closed by the server just when it is reused
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        connect_s = self.connect_s if wait_s is None else min(self.connect_s, wait_s)
        connection = self._connect(self._host, self._port, timeout=connect_s)
        still_open = self._open
        still_open.add(connection)
        try:
            connection.connect()
            sock = connection.sock
            if still_open is not self._open:
                raise ConnectionAbortedError("the request was given up")
            _wait_while_host_lives(sock)
            with self._watch.over(sock) if wait_s is None else hang_up_after(sock, wait_s):
                connection.request(method, self._path + path, body, headers)
                response = connection.getresponse()
            with hang_up_after(sock, BODY_S):
                answer = self._body(response, path, most_bytes)
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in (EMFILE, ENFILE):
                raise OutOfFiles(
                    f"no connection to the server at {self.base_url}: this process has as many "
                    "open files as it may. Raise the limit (ulimit -n 65536) before the run, or "
                    "lower max_inflight_tasks."
                ) from error
            raise ServerGone(f"{type(error).__name__}: {self._shown(str(error))}") from error
        finally:
            still_open.discard(connection)
            connection.close()
        if response.status == 401:
            mine = f"the one in {KEY} is not the server's" if self._key else f"{KEY} is not set"
            raise Refused(
                401,
                f"it asks for a key, and {mine}. Set {KEY}, or {KEY_FILE}, to the same value for "
                "server and trainer; only a trainer on the server's own machine needs none",
            )
        if response.status != 200:
            raise Refused(response.status, self._shown(_message(answer)) or "no reason given")
        return self._parsed(answer, path)

    def _body(self, response: HTTPResponse, path: str, most_bytes: int) -> bytes:
        answer = response.read(most_bytes + 1)
        if len(answer) > most_bytes:
            raise self.odd(path, f"more than {most_bytes} bytes")
        if response.length:  # read() takes a connection that closes early for the end
            raise HTTPException(f"{response.length} bytes of its answer are missing")
        return answer

    def _parsed(self, answer: bytes, path: str) -> dict[str, Any]:
        try:
            parsed = json.loads(answer or b"{}", parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise self.odd(path, f"no JSON ({self._shown(str(error))})") from error
        if not isinstance(parsed, dict):
            raise self.odd(path, f"no JSON object, but {self._shown(json.dumps(parsed))}")
        return parsed

    def value(self, path: str, names: str, kind: type) -> Any:
        """`field` of what a GET of `path` answers."""
        return self.field(self.get(path), path, names, kind)

    def field(self, answer: dict[str, Any], path: str, names: str, kind: type) -> Any:
        """The value at `names`, like "a.b.c", of the answer to `path`. EngineError where there is
        none of exactly this type.
        """
        value: Any = answer
        for name in names.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if type(value) is not kind:
            shown = self._shown(repr(value))
            raise self.odd(path, f"{names} must be of type {kind.__name__}, and is {shown}")
        return value

    def odd(self, path: str, what: str) -> EngineError:
        """The error for an answer that vLLM does not give."""
        return EngineError(
            f"the server at {self.base_url} gave an answer to {path.partition('?')[0]} that vLLM "
            f"does not give: {what}. Is it vLLM that runs there?"
        )

    def _shown(self, text: str) -> str:
        """What a server said, for an error: one line, without the key, and not all of it."""
        if self._key:
            text = text.replace(self._key, "<key>")
        text = "".join(c if c.isprintable() else " " for c in text)
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _wait_while_host_lives(sock: socket.socket) -> None:
    """Wait without a time limit, but fail two minutes after the other machine is gone."""
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):  # not on macOS
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _message(answer: bytes) -> str:
    """The message in an error response, in any of the usual forms."""
    text = answer.decode(errors="replace")
    try:
        error = json.loads(text)
        return str(error["error"]["message"] if "error" in error else error["detail"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return text


def _no_number(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is no JSON")
