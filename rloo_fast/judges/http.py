"""POST of JSON, each within a time and a size, many at a time."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import httpx2

from ..masking import masked

LARGEST_BYTES = 16 * 2**20  # of an answer
LARGEST_ERROR_BYTES = 2**16
ERROR_BODY_S = 5.0  # the status has told what counts

T = TypeVar("T")


class Response(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes  # of an error, what came of it


class NoResponse(Exception):
    """There was none in time, or it broke off; `unreachable`: nobody was there to ask."""

    def __init__(self, reason: str, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable


class BadResponse(Exception):
    """A whole response that cannot be taken, whoever asks again."""


async def post(client: httpx2.AsyncClient, url: str, body: bytes, limit_s: float) -> Response:
    """The response to `body`; a redirect is a response like others, so no header goes elsewhere.

    limit_s: for all of it: name lookup, connection, TLS, headers, body. Raises NoResponse, or
    BadResponse for one beyond LARGEST_BYTES or compressed, which was not asked for.
    """
    try:
        async with asyncio.timeout(limit_s) as limit:
            async with client.stream("POST", url, content=body) as response:
                if response.status_code == 200:
                    read = await _read(response)
                else:
                    left_s = (limit.when() or 0.0) - asyncio.get_running_loop().time()
                    read = await _read_error(response, min(ERROR_BODY_S, 0.9 * left_s))
                return Response(response.status_code, response.headers, read)
    except TimeoutError as error:
        raise NoResponse(f"no whole answer within {limit_s:g} s") from error
    except httpx2.HTTPError as error:
        kinds = (httpx2.ConnectError, httpx2.ProxyError, httpx2.UnsupportedProtocol)
        # from None: some quote what came, which may be the key
        raise NoResponse(_reason(error), isinstance(error, kinds)) from None
    except OSError as error:  # of name lookup and TLS, where the library lets it through
        raise NoResponse(_reason(error), unreachable=True) from None


def _reason(error: BaseException) -> str:
    """The system's words where there are some: "all attempts failed" does not tell why."""
    first = error
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)
    said = error if isinstance(error, OSError) and str(error) else first
    text = masked(str(said)) or "the connection broke off"
    return f"{type(said).__name__}: {text}"


async def _read(response: httpx2.Response) -> bytes:
    coding = response.headers.get("content-encoding", "identity")
    if coding.strip().lower() not in ("", "identity"):
        raise BadResponse(f"its answer is compressed ({coding:.20}), which was not asked for")
    too_long = BadResponse(f"its answer is longer than {LARGEST_BYTES} bytes")
    if int(response.headers.get("content-length", 0)) > LARGEST_BYTES:  # a number, or no response
        raise too_long
    read = bytearray()
    async for part in response.aiter_raw():
        read += part
        if len(read) > LARGEST_BYTES:
            raise too_long
    return bytes(read)


async def _read_error(response: httpx2.Response, limit_s: float) -> bytes:
    read = bytearray()
    try:
        async with asyncio.timeout(limit_s):
            async for part in response.aiter_raw():
                read += part
                if len(read) > LARGEST_ERROR_BYTES:
                    break
    except (TimeoutError, httpx2.HTTPError, OSError):
        pass  # cut or late
    return bytes(read[:LARGEST_ERROR_BYTES])


def make_client(headers: Mapping[str, str], connections: int) -> httpx2.AsyncClient:
    """A client that sends these headers; proxies and certificates are those of the environment.

    Raises ValueError where these cannot be used.
    """
    try:
        return httpx2.AsyncClient(
            headers={**headers, "Accept": "application/json", "Accept-Encoding": "identity"},
            timeout=None,  # `post` has one for all
            limits=httpx2.Limits(max_connections=connections),
            follow_redirects=False,
        )
    except (ValueError, ImportError, OSError, httpx2.InvalidURL) as error:
        raise ValueError(
            f"the proxy or the certificates that the environment names cannot be used: {error}"
        ) from error


def run_apart(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The result of `main()` in an event loop of its own, on another thread: the caller, such as a
    notebook, may be in one. KeyboardInterrupt cancels it."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(main())
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(loop.run_until_complete(task))
        except BaseException as error:
            outcome.set_exception(error)
        finally:
            loop.close()  # does not wait for a name lookup that hangs

    thread = threading.Thread(target=run, name="judge", daemon=True)
    thread.start()
    try:
        return outcome.result()
    except KeyboardInterrupt:
        if not outcome.done():
            loop.call_soon_threadsafe(task.cancel)
            thread.join(ERROR_BODY_S)
        raise
