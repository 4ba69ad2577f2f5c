"""The trainer's side of a warden: a process that is given one job at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from .inside import jail, seccomp
from .inside.jail import Limits
from .inside.setup import Setup
from .inside.tester import RECORD_BYTES
from .inside.warden import TICK_S

START = "import sys; sys.path.insert(0, {!r}); from inside.warden import main; del sys.path[0]; "
START = START.format(str(Path(__file__).parent)) + "main()"
PYTHON = (sys.executable, "-P", "-s", "-S", "-B", "-c", START)
START_LIMIT_S = 60.0
REPORT_LIMIT_S = 30.0  # beyond the wall clock of a job, which the warden watches itself
MAX_MESSAGE = 4096
OUTPUT_BYTES = 16 * 2**10
CUT = "\n[the output goes on, and is not shown]"
NO_RECORD = b'{"loaded": false, "passed": false, "why": ""}'


class SandboxError(RuntimeError):
    """Programs cannot be run in a sandbox: on this machine, or no longer."""


def capabilities() -> dict[str, Any]:
    """{"available", "why": not, "landlock": its ABI, "network": what keeps it away, "disk": who
    bounds what is written} of this machine, as found by shutting a process in."""
    found = {"available": False, "why": unsuited(), "landlock": 0, "network": "", "disk": ""}
    if found["why"]:
        return found
    found["landlock"] = jail.landlock_version()
    try:
        with Warden() as warden:
            namespaces, bounds_disk = warden.namespaces, warden.bounds_disk
    except SandboxError as error:
        return found | {"why": str(error)}
    walls = ["no sockets (seccomp)", *(["a namespace without network"] if namespaces else [])]
    disk = "the kernel" if bounds_disk else f"a look every {TICK_S * 1000:.0f} ms"
    return found | {"available": True, "network": ", ".join(walls), "disk": disk}


def unsuited() -> str:
    """Why there is no sandbox on this kind of machine, "" if there may be."""
    if sys.platform != "linux":
        return f"The sandbox for model code needs Linux (5.13 or later), this is {sys.platform}."
    if platform.machine() not in seccomp.ARCHITECTURES:
        known = " or ".join(seccomp.ARCHITECTURES)
        return f"The sandbox for model code knows {known} machines, this is {platform.machine()}."
    if not jail.landlock_version():
        return (
            "The sandbox for model code needs Landlock, which keeps a program to its own files. "
            f"This kernel ({platform.release()}) has none, or it is turned off: it takes Linux "
            "5.13 or later with `landlock` among the security modules (lsm= on the kernel's "
            "command line), and a container that lets its system calls through."
        )
    return ""


class Warden:
    """Starts the process; raises SandboxError where a program cannot be shut in."""

    def __init__(self) -> None:
        if why := unsuited():
            raise SandboxError(why)
        self._folder = tempfile.TemporaryDirectory(prefix="rloo_fast-sandbox-")
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        library_path = os.environ.get("LD_LIBRARY_PATH")  # Python itself may need it
        self.process = subprocess.Popen(
            [*PYTHON, str(theirs.fileno()), self._folder.name],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # One seed of hashes: the order of a set, and so a verdict, is the same in every warden.
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
            | ({"LD_LIBRARY_PATH": library_path} if library_path else {}),
            cwd="/",
            start_new_session=True,  # Ctrl-C is the pool's to handle
        )
        theirs.close()
        hello = self._receive(START_LIMIT_S)
        if hello["error"]:
            self.close()
            raise SandboxError(f"A process cannot be shut in on this machine: {hello['error']}.")
        self.namespaces: bool = hello["namespaces"]
        self.bounds_disk: bool = hello["disk"]

    def __enter__(self) -> Warden:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, program: str, test: str, setup: str, limits: Limits) -> dict[str, Any]:
        """The warden's report and the tester's record, as one: see `Warden._run` and `tester.run`.

        What each process needs is in a file of its own, which the warden hands on unread: a program
        cannot find its test in the memory of the process that it comes from.
        """
        files = [
            _file({"program": program, "shared": Setup(setup).shared()}),
            _file({"test": test, "setup": setup}),
            os.memfd_create("result"),
        ]
        report, record = self._ask(files, limits, RECORD_BYTES)
        return report | json.loads(record or NO_RECORD)

    def run_script(self, program: str, limits: Limits) -> tuple[dict[str, Any], str]:
        """The warden's report, and the first OUTPUT_BYTES of what the program printed."""
        files = [_file({"program": program}), os.memfd_create("result")]
        report, output = self._ask(files, limits, OUTPUT_BYTES + 1)
        text = output[:OUTPUT_BYTES].decode("utf-8", "replace")
        return report, text + (CUT if len(output) > OUTPUT_BYTES else "")

    def _ask(
        self, files: list[int], limits: Limits, num_bytes: int
    ) -> tuple[dict[str, Any], bytes]:
        """The report of the job in these files, and the first bytes of the last one."""
        try:
            message = json.dumps(dataclasses.asdict(limits)).encode()
            socket.send_fds(self._control, [message], files)
            report = self._receive(limits.time_s + REPORT_LIMIT_S)
            return report, os.pread(files[-1], num_bytes, 0)
        except OSError as error:
            self.close()
            raise SandboxError(f"A process of the sandbox has ended: {error}") from error
        finally:
            for file in files:
                os.close(file)

    def close(self) -> None:
        """End the process, and the candidate that it may be watching."""
        self._control.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()  # a candidate dies with the process it was forked from
            self.process.wait()
        with suppress(OSError):
            self._folder.cleanup()

    def _receive(self, limit_s: float) -> dict[str, Any]:
        self._control.settimeout(limit_s)
        try:
            message = self._control.recv(MAX_MESSAGE)
        except OSError as error:
            message, why = b"", f"{error}"
        else:
            why = "it closed its end"
        if not message:
            self.close()
            raise SandboxError(f"A process of the sandbox gave no answer: {why}.")
        return json.loads(message)


def _file(job: dict[str, str]) -> int:
    file = os.memfd_create("job")
    with open(file, "wb", closefd=False) as stream:
        stream.write(json.dumps(job).encode())
    return file
