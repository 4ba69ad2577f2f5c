"""The reward `code`: what a completion's program makes of its tests, in a sandbox."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from rloo_fast.rewards.builtin import Completion, completion_text
from rloo_fast.sandbox import Sandbox, Verdict

logger = logging.getLogger(__name__)

# A block that the length limit cut off ends with the text.
_BLOCK = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>```|~~~)[ \t]*(?P<language>[\w+-]*)[^\n]*\n"
    r"(?P<code>.*?)(?:^[ \t]*(?P=fence)|\Z)",
    re.DOTALL | re.MULTILINE,
)
_PYTHON = ("python", "py", "python3")
# Not by parsing: a solution that was cut off is one, too.
_DEFINES = re.compile(r"^[ \t]*(async[ \t]+def|def|class)[ \t]+\w", re.MULTILINE)


class CodeReward:
    """r_i = 1 if all tests pass, else partial_credit x the share that does.

    Columns: `test_list` (list of assert statements; None: the reward does not apply to that row),
    `test_setup_code` (code that they need) and `test_imports` (list of lines of the same kind).
    The program is the last Python block of a completion that defines a function or class, else its
    last Python block, else the same of its other blocks, else all of it. It runs in a Sandbox with
    `timeout_s` per program, `memory_mib` per process, and `workers` at a time (default: one per
    core), while this process goes on. Logs a verdict for each completion; warns of the first test
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
        program = extract_code(completion_text(completion))
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


def extract_code(text: str) -> str:
    """The last block between fences that says Python, else the last block, else the text.

    Blocks that define a function or class come before those that do not, which may use it.
    """
    matches = list(_BLOCK.finditer(text))
    python = [match for match in matches if match["language"].lower() in _PYTHON]
    blocks = [_dedented(match["code"], match["indent"]) for match in python or matches]
    solutions = [code for code in blocks if _DEFINES.search(code)]
    return (solutions or blocks or [text])[-1]


def _dedented(code: str, indent: str) -> str:
    """Without the indentation that its fence has: the block of an item in a list."""
    return re.sub(rf"^[ \t]{{1,{len(indent)}}}", "", code, flags=re.MULTILINE) if indent else code


def _check_lists(column: str, rows: Sequence[object]) -> None:
    for number, row in enumerate(rows):
        good = isinstance(row, list | tuple) and all(isinstance(line, str) for line in row)
        if row is not None and not good:
            raise ValueError(
                f"The column `{column}` must hold lists of strings, but sample {number} of this "
                f"batch has {row!r:.80}, of type {type(row).__name__}. Make it a list: "
                "[text] of one string, json.loads(text) of a list written as text."
            )
