"""Workers of tests as several processes that train together."""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.support.paths import SUPPORT, python_path

HANGS_S = 1500  # what takes so long hangs, also where the machine is busy with other things
PRELOADED = ["tests.support.kill_resume", "deepspeed"]  # which import what most workers do


def forks() -> Any:
    """Processes forked from one that has imported PRELOADED and computed nothing."""
    forkserver = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = python_path()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    forkserver.set_forkserver_preload(PRELOADED)
    return forkserver


def run_worker_processes(
    worker: str, *arguments: str, processes: int = 2, timeout_s: float = HANGS_S
) -> subprocess.CompletedProcess[str]:
    """tests/support/<worker>.py with these arguments, as under torchrun: what each rank needs is in
    its environment, and one that fails ends the others. One process is alone. As forks they
    spare the imports, which take as long as many of the runs.

    Raises subprocess.TimeoutExpired if they run for longer than timeout_s.
    """
    command, context = [f"{worker}.py", *arguments], forks()
    given = (command, dict(os.environ), processes, free_port())
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(processes)]
        ranks = [
            context.Process(target=_run, args=(*given, rank, log)) for rank, log in enumerate(logs)
        ]
        for process in ranks:
            process.start()
        try:
            code = _wait(ranks, command, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        errors = "".join(log.read_text(errors="replace") for log in logs)
    return subprocess.CompletedProcess(command, code, "", errors)


def _wait(ranks: list[Any], command: list[str], timeout_s: float) -> int:
    """The first exit code that is not 0, else 0."""
    deadline = time.monotonic() + timeout_s
    running = {process.sentinel: process for process in ranks}
    while running:
        ended = wait(running, deadline - time.monotonic())
        if not ended:
            raise subprocess.TimeoutExpired(command, timeout_s)
        for process in [running.pop(sentinel) for sentinel in ended]:
            process.join()
            if process.exitcode:
                return process.exitcode
    return 0


def _run(
    command: list[str], environment: dict[str, str], processes: int, port: int, rank: int, log: Path
) -> None:
    """In a fork: the worker as the main script, with what it prints in `log`."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    if processes > 1:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        place = {f"{local}{name}": str(number) for local in ("", "LOCAL_")
                 for name, number in (("RANK", rank), ("WORLD_SIZE", processes))}  # fmt: skip
        os.environ.update(meeting | place)
    script = str(SUPPORT / command[0])
    sys.argv = [script, *command[1:]]
    runpy.run_path(script, run_name="__main__")


def free_port() -> int:
    """Below those that the system gives to whoever asks for any, until its user takes it."""
    for port in random.sample(range(15000, 30000), 100):
        with suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def torchrun(processes: int) -> list[str]:
    """The command; the processes meet on a port that is free when they do."""
    standalone = ["--standalone", "--local_addr", "127.0.0.1"]
    return [sys.executable, "-m", "torch.distributed.run", *standalone,
            "--nproc_per_node", str(processes)]  # fmt: skip
