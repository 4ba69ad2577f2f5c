"""Answers that nobody waits for are taken from the queues, or the error says that none came."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from rloo_fast.rollout.vllm import executor


class Queue:
    def __init__(self, *answers: Any):
        self.answers = list(answers)

    def dequeue(self, timeout: float | None = None) -> Any:
        if not self.answers:
            raise TimeoutError
        return self.answers.pop(0)


@pytest.fixture
def asking(monkeypatch):
    """A class that asks as vLLM 0.32's does: all workers, and raises with the first that failed."""

    class MultiprocExecutor:
        def __init__(self, *queues: Queue):
            self.response_mqs: Any = list(queues)

        def collective_rpc(self, method: str) -> list[Any]:
            answers: list[Any] = []
            for queue in self.response_mqs:
                failed, answer = queue.dequeue(timeout=1.0)
                if failed:
                    raise RuntimeError(answer)
                answers.append(answer)
            return answers

    module: Any = ModuleType("vllm.v1.executor.multiproc_executor")
    module.MultiprocExecutor = MultiprocExecutor
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(executor, "import_module", lambda name: sys.modules[name])
    executor.install()
    return MultiprocExecutor


def test_the_next_question_gets_its_own_answer(asking):
    asked = asking(Queue((True, "refused"), (False, 1)), Queue((True, "refused"), (False, 2)))
    with pytest.raises(RuntimeError, match="refused"):
        asked.collective_rpc("load")
    assert asked.collective_rpc("rank") == [1, 2]


def test_a_worker_that_never_answers_does_not_hide_why_another_failed(asking):
    asked = asking(Queue((True, "no such weight")), Queue())
    with pytest.raises(RuntimeError, match="no such weight") as caught:
        asked.collective_rpc("load")
    assert "restart the server" in caught.value.__notes__[0]
