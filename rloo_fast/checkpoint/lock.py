"""One run at a time in an output_dir: two would publish each other's half-written checkpoints."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from accelerate import Accelerator

from ..config.rloo_config import RLOOConfig
from ..distributed.collectives import gather_objects
from .files import clear_left

logger = logging.getLogger(__name__)

LOCK = ".rloo_lock"


_held: set[IO[str]] = set()


@contextmanager
def locked(args: RLOOConfig, accelerator: Accelerator) -> Iterator[None]:
    """Hold the lock of the output_dir, on the process that writes. Every process must call.

    Raises ValueError on every process if another run holds it, of this process too. The lock ends
    with the process, however that ends, on whichever machine and in whichever container; a file
    system that has no locks is warned of. What runs that were killed have left is deleted.
    """
    file, problem = _lock(Path(str(args.output_dir))) if args.should_save else (None, "")
    try:
        if problem := next(filter(None, gather_objects(accelerator, problem)), ""):
            raise ValueError(problem)
        yield
    finally:
        if file is not None:
            _held.discard(file)
            with suppress(OSError):  # who held it is nobody's business, least of all the Hub's
                file.truncate(0)
            file.close()


def _lock(output_dir: Path) -> tuple[IO[str] | None, str]:
    """The locked file, or why this run cannot have it."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / LOCK).open("a+")
    except OSError as error:
        return None, (
            f"{str(output_dir / LOCK)!r}, which keeps other runs out, cannot be opened "
            f"({error.strerror}): choose another output_dir, or delete it if no run uses it."
        )
    try:
        # not lockf: its locks end when the process closes the file that it has opened a second
        # time, as an upload of the output_dir does, and do not keep out the process itself
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read(200).strip() or "unknown"
        file.close()
        return None, (
            f"output_dir {str(output_dir)!r} is in use by another run ({owner}): choose another "
            "output_dir, or wait until it has ended."
        )
    except OSError as error:
        logger.warning("output_dir %r cannot be locked (%s).", str(output_dir), error.strerror)
        file.close()
        return None, ""
    _held.add(file)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    clear_left(output_dir)
    return file, ""


def _let_go() -> None:
    """In a process that was forked, which would hold the lock for as long as it lives."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
