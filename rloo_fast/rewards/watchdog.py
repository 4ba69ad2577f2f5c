"""Says where a reward function hangs when no thread of Python can: it holds the GIL."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FunctionType
from typing import Any

MAX_NAME = 480  # faulthandler prints 500 characters of a function's name
MIN_S = 0.01

_lock = threading.Lock()
_deadlines: dict[object, float] = {}


@contextmanager
def watched(after_s: float) -> Iterator[None]:
    """If this takes longer, print where all threads are to stderr: from C, without the GIL."""
    mine = object()
    with _lock:
        _deadlines[mine] = time.monotonic() + after_s
        _set_alarm()
    try:
        yield
    finally:
        with _lock:
            del _deadlines[mine]
            _set_alarm()


def named(run: Callable[[], Any], name: str) -> Callable[[], Any]:
    """`run`, with a line of this name on the stack for whoever prints it."""
    call = FunctionType(_call.__code__.replace(co_name=name[:MAX_NAME]), _call.__globals__)
    return lambda: call(run)


def _call(run: Callable[[], Any]) -> Any:
    return run()


def _set_alarm() -> None:
    """A process has one."""
    faulthandler.cancel_dump_traceback_later()
    if _deadlines and sys.__stderr__ is not None:
        left = max(min(_deadlines.values()) - time.monotonic(), MIN_S)
        with suppress(ValueError, OSError):  # it is closed, or no file
            faulthandler.dump_traceback_later(left, file=sys.__stderr__)
