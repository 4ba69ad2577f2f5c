"""A function that the model may call, and the JSON schema that its chat template shows of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

HOW_TO_WRITE = (
    " A tool is a function with type hints and a docstring in Google's style, which is all that "
    "the model is told of it:\n"
    "    def add(a: int, b: int) -> int:\n"
    '        """Add two numbers.\n\n'
    "        Args:\n"
    "            a: The first one.\n"
    "            b: The second one.\n"
    '        """'
)


@dataclass(frozen=True)
class Tool:
    """`function` under the name that a model calls it by."""

    name: str
    function: Callable[..., Any]
    schema: dict[str, Any]  # {"type": "function", "function": {"name", "description", ...}}
    is_async: bool
    has_own_limit: bool = False  # of time: it ends by itself, and may have to wait for its turn

    @classmethod
    def of(cls, function: Any, whose: str = "tools") -> Tool:
        """The tool that a function or bound method is; `whose`: where it was given, for errors.

        Raises TypeError for what is no function, ValueError for one without docstring or hints, and
        for a generator, whose result would be the generator.
        """
        if not (inspect.isfunction(function) or inspect.ismethod(function)):
            raise TypeError(
                f"{whose} has {function!r:.80} of type {type(function).__name__}: write a function "
                "or a method around it." + HOW_TO_WRITE
            )
        name = function.__name__
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            raise ValueError(
                f"{whose}: {name!r} is a generator (it has a `yield`), and a model reads a whole "
                "answer: return it, as one text."
            )
        try:
            schema = get_json_schema(function)
        except Exception as error:  # docstring or hints missing, or of a kind that JSON has not
            raise ValueError(f"{whose}: {name!r} has no schema: {error}." + HOW_TO_WRITE) from error
        own_limit = getattr(function, "has_own_limit", False)
        return cls(name, function, schema, inspect.iscoroutinefunction(function), own_limit)


def tools_of(functions: Iterable[Any], whose: str = "tools") -> list[Tool]:
    """`Tool.of` each."""
    return [Tool.of(function, whose) for function in functions]


def check_names(tools: Sequence[Tool], where: str) -> None:
    """Raise ValueError for a name that stands for two tools: a call could mean either."""
    names = [tool.name for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{where}: several tools are called {', '.join(map(repr, twice))}. A call has nothing "
            "but the name: rename all but one."
        )
