"""The tools of one trajectory, and what a call of one came to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .calls import CallDropped, Caller
from .functions import Tool


@dataclass(frozen=True)
class ToolResult:
    """What a `tool` message says.

    ToolResult("7", failed=False, seconds=0.01)
    ToolResult("{'error': 'division by zero'}", failed=True, seconds=0.01)
    """

    content: str | list[dict[str, Any]]  # a text, or blocks {"type": "text", "text": ...}
    failed: bool  # it raised, hung, is not there or was called wrongly: `content` says so
    seconds: float  # from the start of the call to its result
    ends: bool = False  # the trajectory, as tool_failure="end" has it


class ToolSet:
    """What one trajectory may call; `schemas` go to apply_chat_template(tools=...).

    `environment`: whose methods are among the tools; None: there is none. Synchronous tools of a
    trajectory run one after another in the order of their calls, as they may share its environment;
    async ones run at the same time as these and one another.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        caller: Caller,
        *,
        environment: Any = None,
        failure_ends: bool = False,
        on_failure: Callable[[str, BaseException], None] | None = None,
    ):
        self.environment = environment
        self._num_unfinished = 0  # calls that run, also those that were given up
        self._tools = {tool.name: tool for tool in tools}
        self._caller, self._failure_ends, self._on_failure = caller, failure_ends, on_failure
        self._lock = threading.Lock()

    @property
    def is_free(self) -> bool:
        """Whether nothing works on the environment any more."""
        return not self._num_unfinished

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in self._tools.values()]

    def start(self, name: str, arguments: dict[str, Any]) -> Future[ToolResult]:
        """Call the tool `name`. The future has a result in time, and never an exception."""
        started, future = time.monotonic(), Future()

        def finish(call: Future[Any]) -> None:
            result = self._result(name, call, time.monotonic() - started)
            with suppress(InvalidStateError):  # nobody waits for it any more
                future.set_result(result)

        self._start(name, arguments).add_done_callback(finish)
        return future

    def _start(self, name: str, arguments: Any) -> Future[Any]:
        tool = self._tools.get(name)
        wrong = None
        if tool is None:
            wrong = f"Tool {name} not found."
        elif not (isinstance(arguments, dict) and all(isinstance(key, str) for key in arguments)):
            wrong = f"Arguments of {name} must be an object with names, got {arguments!r:.80}."
        if tool is None or wrong:
            future: Future[Any] = Future()
            future.set_exception(ValueError(wrong))
            return future
        function = self._counted_async(tool) if tool.is_async else self._counted(tool)
        with self._lock:
            self._num_unfinished += 1
        return self._caller.start(
            function,
            arguments,
            name=name,
            is_async=tool.is_async,
            is_limited=not tool.has_own_limit,
            lane=id(self),
        )

    def _counted(self, tool: Tool) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            try:
                return tool.function(**arguments)
            finally:
                self._one_less()

        return call

    def _counted_async(self, tool: Tool) -> Callable[..., Any]:
        async def call(**arguments: Any) -> Any:
            try:
                return await tool.function(**arguments)
            finally:
                self._one_less()

        return call

    def _one_less(self) -> None:
        with self._lock:
            self._num_unfinished -= 1

    def _result(self, name: str, call: Future[Any], seconds: float) -> ToolResult:
        error = call.exception()
        if error is None:
            try:
                return ToolResult(_content(call.result()), False, seconds)
            except Exception as problem:  # what is returned may have any __str__
                error = problem
        if isinstance(error, CallDropped):
            self._one_less()
        elif self._on_failure is not None:
            self._on_failure(name, error)
        # the same text as TRL's
        return ToolResult(_text({"error": message_of(error)}), True, seconds, self._failure_ends)


def message_of(error: BaseException) -> str:
    """What it says; of one that cannot say it, its type."""
    try:
        return _text(error)
    except Exception:
        return type(error).__name__


def _content(value: Any) -> str | list[dict[str, Any]]:
    """A list of content blocks as `_plain` has it, anything else as its text. Raises ValueError for
    blocks that are no text."""
    if isinstance(value, list) and value and all(_is_block(item) for item in value):
        if other := sorted({str(item["type"]) for item in value} - {"text"}):
            raise ValueError(
                f"A tool returned content of type {', '.join(other)}; only text can be read."
            )
        return [_plain({**item, "text": _text(item.get("text", ""))}) for item in value]
    return _text(value)


def _plain(value: Any) -> Any:
    """Dicts, lists and numbers as they are, anything else as its text: what JSON has, so that
    messages can be sent to other processes and kept in a checkpoint."""
    if value is None or type(value) in (int, float, bool):
        return value
    if isinstance(value, dict):
        return {_text(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _text(value)


def _is_block(item: Any) -> bool:
    return isinstance(item, dict) and "type" in item


def _text(value: Any) -> str:
    """Its text, in which half a surrogate pair, that no tokenizer reads, is a question mark."""
    return str(value).encode("utf-8", "replace").decode("utf-8")
