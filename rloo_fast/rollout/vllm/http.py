"""What trainer and server share of their HTTP: the key, time limits, and names in the protocol."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BACKEND = "rloo_fast"  # the name under which vLLM knows this way of transferring weights
PROTOCOL = 3  # trainer and server, which may be different installations, must agree on it
KEY = "VLLM_API_KEY"  # vLLM's own name
KEY_FILE = "RLOO_FAST_API_KEY_FILE"
TRAINER_HOST = "RLOO_FAST_TRAINER_HOST"
# the server's one answer to weights that it could not fetch, whatever the reason
NOT_FETCHED = "the weights that were offered could not be fetched; the server's log says why."
# ... and to a dtype that not all of its weights would survive
WIDER = "the server holds weights in a wider dtype"
# ... to a trainer with which this server has not met, or no longer is in a group
NOT_MET = "the server has not met this trainer"

SILENT_S = 60.0  # that a transfer of weights may take besides its bytes
SLOWEST = 8 * 2**20  # bytes per second
STALL_S = 300.0  # longest from one bucket of an update to the next


def api_key() -> str | None:
    """The key of the rollout server, from VLLM_API_KEY or the file RLOO_FAST_API_KEY_FILE names.

    None: neither is set. Raises ValueError, without the key, for one that no header can carry.
    """
    key, path = os.environ.get(KEY, ""), os.environ.get(KEY_FILE, "")
    if key and path:
        raise ValueError(f"{KEY} and {KEY_FILE} are both set: keep one of them.")
    if not key and not path:
        return None
    name = f"the file that {KEY_FILE} names" if path else KEY
    if path:
        try:
            key = Path(path).read_bytes()[:4096].decode(errors="replace").strip()
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error}.") from error
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            f"{name} must hold one word of printable ASCII characters and nothing else; it has "
            f"{len(key)} characters."
        )
    return key


def patience_s(nbytes: int) -> float:
    """Longest that a transfer of so many bytes of weights may take, from first to last."""
    return SILENT_S + nbytes / SLOWEST


@contextmanager
def hang_up_after(sock: socket.socket, seconds: float | None) -> Iterator[None]:
    """Shut the connection down when the block takes longer, and raise TimeoutError.

    A socket's own time limit is one per read, which a peer that sends a byte at a time never meets.
    None: no limit.
    """
    if seconds is None:
        yield
        return
    over = threading.Event()
    timer = threading.Timer(seconds, _shut_down, [sock, over])
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if over.is_set():
            raise TimeoutError(f"not done after {seconds:g} s") from error
        raise
    else:
        if over.is_set():  # what was read may look whole
            raise TimeoutError(f"not done after {seconds:g} s")
    finally:
        timer.cancel()


def _shut_down(sock: socket.socket, over: threading.Event) -> None:
    over.set()
    with suppress(OSError):  # it is closed
        sock.shutdown(socket.SHUT_RDWR)
