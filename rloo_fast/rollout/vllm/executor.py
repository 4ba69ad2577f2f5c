"""Answers of a tensor-parallel server's workers, read by whoever asked, and never by the next one.

vLLM 0.32 asks all workers and raises with the first that failed. What the others answered stays in
their queues, so that every later question gets the answer to the one before: a server that has
refused something once would refuse the next thing as well.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

DRAIN_S = 600.0  # that the other workers may take to fail, or to finish, as well


def install() -> None:
    """For all executors of this process. Raises ImportError for a vLLM that is built otherwise."""
    try:
        executor: Any = import_module("vllm.v1.executor.multiproc_executor").MultiprocExecutor
        original = executor.collective_rpc
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"rloo_fast does not know the executor of this vLLM ({error})."
        ) from error
    if original.__module__ == __name__:
        return

    def collective_rpc(self: Any, *args: Any, **named: Any) -> Any:
        if named.get("non_block") or named.get("unique_reply_rank") is not None:
            return original(self, *args, **named)
        queues = self.response_mqs
        self.response_mqs = asked = [_Asked(queue) for queue in queues]
        try:
            return original(self, *args, **named)
        except RuntimeError as error:
            if any(queue.is_read for queue in asked):  # else nobody was asked
                for queue in asked:
                    if not queue.is_read:
                        _drain(queue, error)
            raise
        finally:
            self.response_mqs = queues

    executor.collective_rpc = collective_rpc


def _drain(queue: _Asked, error: RuntimeError) -> None:
    """Take the answer that nobody waits for; `error`, which is raised, says if none came."""
    try:
        queue.dequeue(timeout=DRAIN_S)
    except TimeoutError:
        error.add_note(f"another worker did not answer within {DRAIN_S:.0f} s: restart the server.")


class _Asked:
    """A worker's queue of answers, and whether one was read."""

    def __init__(self, queue: Any):
        self._queue, self.is_read = queue, False

    def dequeue(self, timeout: float | None = None) -> Any:
        answer = self._queue.dequeue(timeout=timeout)
        self.is_read = True
        return answer
