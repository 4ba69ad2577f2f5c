"""SIGTERM: the step under way is finished, a checkpoint saved, and the process ends."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from typing import Any

from accelerate import Accelerator

from ..checkpoint.together import any_process

logger = logging.getLogger(__name__)


class Termination:
    """While active, SIGTERM asks for a save and a clean end instead of killing the process."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.requested = False  # this process got the signal
        self.agreed = False  # one process did, and all know
        self._previous: Any = None

    def __enter__(self) -> Termination:
        self.requested = self.agreed = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, *_: Any) -> None:
        self.requested = True

    def __exit__(self, *_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def agree(self) -> bool:
        """Whether SIGTERM reached one of the processes; every process must ask."""
        self.agreed = self.agreed or any_process(self.accelerator, self.requested)
        return self.agreed

    def exit_if_requested(self, step: int, last_saved_step: int | None) -> None:
        """At the end of train(), after `step` steps: exit 0 if SIGTERM came and the checkpoint of
        that step is there, 1 if it could not be saved."""
        stopped = self.agreed
        if not self.agree():
            return
        if last_saved_step == step:
            logger.warning("SIGTERM: saved after step %d, exiting.", step)
            sys.exit(0)
        if stopped:
            logger.error("SIGTERM: exiting; the checkpoint of step %d could not be saved.", step)
            sys.exit(1)
        logger.warning("SIGTERM came after the last step; train() returns as usual.")
