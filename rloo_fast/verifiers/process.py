"""The processes of a verifier: one that has imported it, and those forked from it.

    pool -- a socket's end --> source -- fork --> worker <-- jobs, answers --> pool

A worker is shut in as programs of the sandbox are where the machine can do so (no network, no
program, no file to write, no more memory than allowed), and lets no text become code but arithmetic
(guard.py). It answers job after job until the pool closes the socket or kills it.
"""

from __future__ import annotations

import importlib
import logging
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

from ..sandbox.inside import jail, wire
from . import guard

IDLE_S = 2.0  # between looks for the pool's process
NO_LIMIT_S = 10**6  # the pool watches the time of each job
# name -> its module here, with `verify`, and `warm_up` for what the first question would import. It
# may have `missing`: arguments -> a function that builds what they need and is not there, or None
VERIFIERS = {
    "accuracy": ".accuracy",
    "code": ".programs",
    "format": ".pattern",
    "reasoning_gym": ".gym_answers",
}


def main(verifier: str, control_number: int, shut_in: bool) -> None:
    """Serve the socket with this number until it is closed: the first message says "ready"."""
    control = socket.socket(fileno=control_number)
    logging.disable(logging.WARNING)  # of what a verifier thinks of an answer
    module = importlib.import_module(VERIFIERS[verifier], __package__)
    module.warm_up()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the workers
    pool = os.getppid()
    control.send(b"ready")
    while True:
        while not select.select([control], [], [], IDLE_S)[0]:
            if os.getppid() != pool:  # a copy of it may hold the other end of the socket
                return
        message, files, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            return
        source = os.getpid()
        pid = os.fork()
        if not pid:
            _worker(module, files[0], int(message), source if shut_in else None)
        os.close(files[0])
        control.send(str(pid).encode())


def _worker(module: ModuleType, pipe: int, memory_mib: int, source: int | None) -> None:
    """Never returns. source: the process that forked this one, None: it is not shut in."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        memory_mib += _loaded_mib()
        if source is not None:
            limits = jail.Limits(time_s=NO_LIMIT_S, memory_mib=memory_mib)
            jail.enter(limits, [pipe], None, source, readable=sys.path)
        elif sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (memory_mib * 2**20, memory_mib * 2**20))
        guard.set_up()
        _serve(module, pipe)
        status = 0
    finally:
        os._exit(status)


def _loaded_mib() -> int:
    """What this process has mapped; 0 where only Linux would say so."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize() // 2**20


def _serve(module: ModuleType, pipe: int) -> None:
    missing: Callable[..., Any] = getattr(module, "missing", lambda *arguments: None)
    with suppress(EOFError):
        while True:
            for arguments in wire.receive(pipe):
                if (build := missing(*arguments)) is not None:
                    wire.send(pipe, ["building", None])
                    with suppress(Exception):  # `verify` meets it again, and says what is wrong
                        build()
                    wire.send(pipe, ["built", None])
                wire.send(pipe, _answer(module.verify, arguments))


def _answer(verify: Callable[..., Any], arguments: list[Any]) -> list[Any]:
    try:
        return ["value", verify(*arguments)]
    except MemoryError:
        return ["limit", "memory"]
    except RecursionError:
        return ["limit", "depth"]
    except Exception as error:
        return ["error", f"{type(error).__name__}: {error}"[:500]]
