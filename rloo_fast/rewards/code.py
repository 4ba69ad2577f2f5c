"""The reward `code`: what a completion's program makes of its tests, in a sandbox."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ..records import Count
from ..sandbox import Sandbox, Verdict
from ..verifiers import OverLimit, shared_verifiers
from .builtin import Completion, completion_text

logger = logging.getLogger(__name__)

READ_LIMIT_S = 5.0
UNREAD = f"no program was found within {READ_LIMIT_S:g} s"


class CodeReward:
    """r_i = 1 if all tests pass, else partial_credit x the share that does.

    Columns: `test_list` (list of assert statements; None: the reward does not apply to that row),
    `test_setup_code` (code that they need) and `test_imports` (list of lines of the same kind).
    The program is the last Python block of a completion that defines a function or class which the
    tests use, else the last that defines any, else its last Python block, else the same of its
    other blocks, else all of it. It runs in a Sandbox with
    `timeout_s` per program, `memory_mib` per process, and `workers` at a time (default: one per
    core), while this process goes on. A text in which no program is found in READ_LIMIT_S earns 0;
    `over_limit` counts these. Logs a verdict for each completion; warns of the first test
    that the sandbox cannot ask.
    """

    executes_model_code = True  # so that a run must allow it

    def __init__(
        self,
        timeout_s: float = 10.0,
        memory_mib: int = 512,
        workers: int | None = None,
        partial_credit: float = 0.5,
    ) -> None:
        if not 0 <= partial_credit <= 1:
            raise ValueError(f"partial_credit must be between 0 and 1, got {partial_credit}.")
        self.__name__ = "code"  # in metrics
        self.partial_credit = partial_credit
        self._warned = False
        self.sandbox = Sandbox(timeout_s=timeout_s, memory_mib=memory_mib, workers=workers)

    async def __call__(
        self,
        completions: list[Completion],
        test_list: list[list[str] | None],
        test_setup_code: list[str | None] | None = None,
        test_imports: list[list[str] | None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        _check_lists("test_list", test_list)
        _check_lists("test_imports", test_imports or ())
        nothing = [None] * len(completions)
        rows = zip(
            completions,
            test_list,
            test_setup_code or nothing,
            test_imports or nothing,
            strict=True,
        )
        verdicts = await asyncio.gather(*(self._verdict(*row) for row in rows))
        if log_extra is not None:
            log_extra("verdict", ["no tests" if v is None else str(v) for v in verdicts])
        if log_metric is not None:
            unread = sum(v is not None and v.why == UNREAD for v in verdicts)
            log_metric("over_limit", Count(unread))
        return [None if v is None else self._reward(v) for v in verdicts]

    async def _verdict(
        self,
        completion: Completion,
        tests: Sequence[str] | None,
        setup: str | None,
        imports: Sequence[str] | None,
    ) -> Verdict | None:
        if not tests:
            return None
        # CommonMark takes a time that grows with the square of some texts' length
        reading = shared_verifiers("code", READ_LIMIT_S).submit(
            completion_text(completion), list(tests)
        )
        try:
            program = await asyncio.wrap_future(reading)
        except OverLimit:
            return Verdict(0, len(tests), UNREAD)
        before = "\n".join([*(imports or ()), setup or ""])
        # Others may wait for the same program: one who stops waiting must not cancel it for all.
        verdict = await asyncio.shield(
            asyncio.wrap_future(self.sandbox.submit(program, tests, before))
        )
        if verdict.why.startswith("unaskable test") and not self._warned:
            self._warned = True
            logger.warning(
                "The sandbox cannot ask a test, so that no program passes it: %s; the tests: "
                "%.200r. docs/sandbox.md lists what it cannot ask. More are told only as verdicts.",
                verdict.why,
                list(tests),
            )
        return verdict

    def _reward(self, verdict: Verdict) -> float:
        if verdict.passed == verdict.total:
            return 1.0
        return self.partial_credit * verdict.passed / verdict.total


def _check_lists(column: str, rows: Sequence[object]) -> None:
    for number, row in enumerate(rows):
        good = isinstance(row, list | tuple) and all(isinstance(line, str) for line in row)
        if row is not None and not good:
            raise ValueError(
                f"The column `{column}` must hold lists of strings, but sample {number} of this "
                f"batch has {row!r:.80}, of type {type(row).__name__}. Make it a list: "
                "[text] of one string, json.loads(text) of a list written as text."
            )
