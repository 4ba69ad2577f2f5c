"""Whether a server that has not answered yet still works, by asking it something easy meanwhile.

A process that is stopped or hangs keeps its connections, and its host answers for it: from the
connection alone it cannot be told from one that samples a long completion.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

EVERY_S = 60.0  # from one question to the next
MOST_SILENT = 5  # questions in a row without an answer


class Watch:
    """Shuts down the connections that are waited for once the server leaves `most_silent`
    questions in a row unanswered. `answers`: asks one, and says whether an answer came.

    Questions are asked, in a thread, only while a connection is waited for.
    """

    def __init__(
        self,
        answers: Callable[[], bool],
        every_s: float = EVERY_S,
        most_silent: int = MOST_SILENT,
    ):
        self._answers, self._every_s, self._most_silent = answers, every_s, most_silent
        self._waiting: set[socket.socket] = set()
        self._changed = threading.Condition()
        self._runs = False

    @contextmanager
    def over(self, sock: socket.socket) -> Iterator[None]:
        """While an answer is waited for on this connection."""
        with self._changed:
            self._waiting.add(sock)
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, daemon=True, name="rollout-watch").start()
        try:
            yield
        finally:
            with self._changed:
                self._waiting.discard(sock)
                self._changed.notify_all()

    def _run(self) -> None:
        num_silent = 0
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: not self._waiting, self._every_s):
                    self._runs = False
                    return
            num_silent = 0 if self._answers() else num_silent + 1
            if num_silent >= self._most_silent:
                with self._changed:
                    for sock in self._waiting:
                        with suppress(OSError):  # it is closed
                            sock.shutdown(socket.SHUT_RDWR)
                num_silent = 0
