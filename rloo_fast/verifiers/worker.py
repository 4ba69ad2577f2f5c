"""The processes of the verifiers as the trainer has them: see process.py for what they do."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from ..sandbox.client import unsuited
from ..sandbox.inside.wire import MAX_BYTES

START_LIMIT_S = 300.0  # a process imports sympy and what builds on it
END_LIMIT_S = 1.0  # for a process that was killed
WAITING = 10  # on a loaded machine a job may take this many times its limit on the clock
START = "import json, sys; sys.path[:] = json.loads({!r}); "
START += "from rloo_fast.verifiers.process import main; main({!r}, {}, {})"
KEPT = ("LD_LIBRARY_PATH", "PATH", "SYSTEMROOT", "TMPDIR")  # of the environment


class VerifierError(RuntimeError):
    """A verifier raised an error that is not the answer's fault."""


class NoProcess(VerifierError):
    """The process of a verifier does not start, or was closed."""


class OverLimit(Exception):
    """A job was ended: `what` is "time", "memory", "depth" or "length"."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Died(Exception):
    """The process is dead: of its job, for lack of memory mostly, or by someone else's hand."""

    what = "memory"


class Source:
    """The process that workers are forked from; it has imported the verifier."""

    def __init__(self, verifier: str) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = json.dumps([os.path.abspath(p) for p in sys.path if p])
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-c"),
                START.format(path, verifier, theirs.fileno(), not unsuited()),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0"} | {n: os.environ[n] for n in KEPT if n in os.environ},
            start_new_session=True,  # Ctrl-C is the pool's to handle
        )
        theirs.close()
        self.has_started = False

    def fork(self, memory_mib: int) -> Worker:
        """A new worker. Raises NoProcess if the source did not start, or has ended."""
        if not self.has_started:
            self._receive()
            self.has_started = True
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self._control, [str(memory_mib).encode()], [theirs.fileno()])
            return Worker(int(self._receive()), ours)
        except OSError as error:
            raise self._ended() from error
        finally:
            theirs.close()

    def close(self) -> None:
        """End the process; from any thread. One that waits in `fork` gets a NoProcess."""
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # for copies in forked processes, too
        self._process.kill()
        self._process.wait()

    def _receive(self) -> bytes:
        self._control.settimeout(START_LIMIT_S)
        with suppress(OSError):
            if message := self._control.recv(64):
                return message
        raise self._ended()

    def _ended(self) -> NoProcess:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_LIMIT_S)
        status = self._process.poll()
        how = f"no answer in {START_LIMIT_S} s" if status is None else f"exit status {status}"
        what = "has ended" if self.has_started else "did not start"
        return NoProcess(
            f"The process of the verifiers {what} ({how}). What it printed stands above."
        )


class Worker:
    """A process that answers one job after another."""

    def __init__(self, pid: int, pipe: socket.socket) -> None:
        self._pid, self._pipe = pid, pipe
        # The number of a process that has died may be another's; what a file stands for may not.
        self._file: int | None = None
        with suppress(ProcessLookupError):
            self._file = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
        self._lock, self._alive = threading.Lock(), True

    def send(self, jobs: list[bytes], time_s: float) -> None:
        """Arguments as JSON, of one job or more; an answer to each follows. Raises Died."""
        raw = b"[" + b",".join(jobs) + b"]"
        try:
            self._pipe.settimeout(WAITING * time_s)
            self._pipe.sendall(len(raw).to_bytes(4, "big") + raw)
        except OSError as error:
            raise Died from error

    def receive(self, time_s: float) -> Any:
        """The next answer. Raises OverLimit if none has come after `time_s` of the processor, or
        WAITING times that on the clock; Died if the process is dead, VerifierError for an error
        that the verifier raised."""
        limit = _Limit(self._pid, time_s)
        while True:
            try:
                size = int.from_bytes(self._read(4, limit), "big")
                kind, value = json.loads(self._read(min(size, MAX_BYTES), limit))
            except TimeoutError as error:
                raise OverLimit("time") from error
            except (OSError, EOFError, ValueError) as error:
                raise Died from error
            if kind not in ("building", "built"):
                break
            # what the verifier needs for this question is no answer's fault
            limit = _Limit(self._pid, START_LIMIT_S if kind == "building" else time_s)
        if kind == "limit":
            raise OverLimit(value)
        if kind == "error":
            raise VerifierError(value)
        return value

    def kill(self) -> None:
        """From any thread; the one that waits in `receive` sees it."""
        with self._lock:
            if not self._alive:
                return
            self._alive = False
            with suppress(ProcessLookupError):
                if self._file is None:
                    os.kill(self._pid, signal.SIGKILL)
                else:
                    signal.pidfd_send_signal(self._file, signal.SIGKILL)
            if self._file is not None:
                select.select([self._file], [], [], END_LIMIT_S)  # its parent reaps it
                os.close(self._file)

    def close(self) -> None:
        self.kill()
        self._pipe.close()

    def _read(self, size: int, limit: _Limit) -> bytes:
        raw = b""
        while len(raw) < size:
            self._pipe.settimeout(limit.wait_s())
            with suppress(TimeoutError):
                if not (piece := self._pipe.recv(size - len(raw))):
                    raise EOFError
                raw += piece
        return raw


class _Limit:
    """The time that a process has for a job."""

    def __init__(self, pid: int, time_s: float) -> None:
        self._pid, self._time_s = pid, time_s
        self._before = _processor_s(pid)
        self._end = time.monotonic() + (time_s if self._before is None else WAITING * time_s)

    def wait_s(self) -> float:
        """How long to wait before asking again. Raises TimeoutError if the time is over."""
        left = self._end - time.monotonic()
        now = _processor_s(self._pid)
        if self._before is not None and now is not None:
            left = min(left, self._time_s - (now - self._before))
        if left <= 0:
            raise TimeoutError
        return max(left, 1e-2)


def _processor_s(pid: int) -> float | None:
    """Seconds of the processor that the process has had; None where only Linux would say so."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()  # the name before may hold spaces
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
