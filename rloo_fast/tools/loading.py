"""What `tools=` stands for: functions, and names of functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..config.code_files import load_function
from ..sandbox import SandboxError
from ..sandbox.client import unsuited
from .calculator import calculator
from .python_tool import python

BUILTINS: dict[str, Callable[..., Any]] = {"calculator": calculator, "python": python}
MODEL_CODE = (
    "The tool {0!r} runs programs that the model wrote, on this machine: in processes of their "
    "own, with little room and no network, but no such wall is perfect. If you want that, write "
    "execute_model_code=True (--execute_model_code true)."
)


def find_tools(tools: Any, *, execute_model_code: bool) -> list[Any]:
    """The functions of a list of functions and names, or of one of these.

    A name is "calculator", "python", "package.module:function" or "path/to/file.py:function". What
    runs programs of the model needs execute_model_code where it is named; a function that is passed
    has been allowed by whoever passed it. Raises ValueError for a name that stands for nothing,
    SandboxError where programs cannot be shut in.
    """
    if tools is None:
        return []
    given: Sequence[Any] = [tools] if isinstance(tools, str) or callable(tools) else tools
    found = [_found(tool, execute_model_code) for tool in given]
    if any(getattr(tool, "executes_model_code", False) for tool in found) and (why := unsuited()):
        raise SandboxError(why)
    return found


def _found(tool: Any, execute_model_code: bool) -> Any:
    if not isinstance(tool, str):
        return tool
    if tool in BUILTINS:
        found = BUILTINS[tool]
    elif ":" in tool:
        found = load_function(tool, "tools")
    else:
        raise ValueError(
            f"{tool!r} is not a tool. A tool is a function, or the name of one: "
            f"{', '.join(map(repr, BUILTINS))}, 'package.module:function', "
            "'path/to/file.py:function'."
        )
    if getattr(found, "executes_model_code", False) and not execute_model_code:
        raise ValueError(MODEL_CODE.format(tool))
    return found
