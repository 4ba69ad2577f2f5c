"""The tool `python`: the model writes a program and reads what it prints."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ..sandbox import Output, Sandbox

NO_OUTPUT = "[the program printed nothing]"


def python_tool(
    *, timeout_s: float = 10.0, memory_mib: int = 512, workers: int | None = None
) -> Callable[[str], Awaitable[str]]:
    """The tool `python` with limits of one's own: seconds and MiB of a program, and how many run at
    a time (default: one per core).

    Raises SandboxError where this machine cannot shut a program in.
    """
    sandbox: list[Sandbox] = []  # made with the first program, so that an import starts nothing

    async def python(code: str) -> str:
        """Run a Python program and return what it prints.

        Every program starts anew: nothing is left of earlier ones. There is no network, and no
        package besides Python's own library.

        Args:
            code: The program. If its last line is an expression, its value is printed, too.

        Returns:
            What it printed, or the error that it ended with.
        """
        if not sandbox:
            sandbox.append(Sandbox(timeout_s=timeout_s, memory_mib=memory_mib, workers=workers))
        if not isinstance(code, str):
            raise TypeError(f"code must be a text, got {type(code).__name__}")
        return _shown(await asyncio.wrap_future(sandbox[0].run(code)))

    python.executes_model_code = True  # so that a run which names it must allow it
    python.has_own_limit = True
    return python


def _shown(output: Output) -> str:
    text = output.text.rstrip("\n")
    if output.why:
        return f"{text}\n[the program was ended: {output.why}]".lstrip("\n")
    return text or NO_OUTPUT


python = python_tool()
