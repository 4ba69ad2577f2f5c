"""The tools and environments of a run: one ToolSet per trajectory, rendered, reset, given back."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from ..records import PromptText
from .calls import Caller
from .environments import (
    NAME_COLUMN,
    EnvironmentFactory,
    EnvironmentKind,
    check_reset_takes,
    environment_rewards,
    find_environments,
    kind_of,
    with_observation,
)
from .functions import Tool, check_names, tools_of
from .loading import find_tools
from .tool_set import ToolSet, message_of

logger = logging.getLogger(__name__)

EMPTY_PROMPT = [{"role": "user", "content": ""}]  # of a row whose environment writes the prompt
MAIN_THREAD_HINT = (
    " It ran in a thread; with tool_threads=0, and without max_staleness, tools run one after "
    "another in the trainer's own."
)


class EnvironmentFailed(RuntimeError):
    """`reset` of an environment raised or hung: there is no trajectory to begin."""


class Opened(NamedTuple):
    """What a trajectory begins with."""

    tool_set: ToolSet
    text: PromptText  # the row's prompt, with what `reset` returned


class RunTools:
    """`tools` for every trajectory, and the methods of the environment of its dataset row.

    timeout_s: of each call, also of `reset`. threads: see Caller. failure_ends: a call that fails
    ends its trajectory, instead of answering with its error. Makes one environment of each kind;
    raises TypeError or ValueError for what cannot be a tool or environment.
    """

    def __init__(
        self,
        tools: Sequence[Any] | str | None = None,
        environment_factory: EnvironmentFactory | None = None,
        *,
        timeout_s: float | None = None,
        threads: int = 32,
        failure_ends: bool = False,
        execute_model_code: bool = False,
    ):
        self.tools = tools_of(find_tools(tools, execute_model_code=execute_model_code))
        self.kinds = find_environments(environment_factory)
        self.failure_ends = failure_ends
        self.caller = Caller(timeout_s, threads)
        check_names(self.tools, "tools")
        for kind in self.kinds.values():
            check_names([*self.tools, *kind.tools], f"tools and {kind.label}")
        self._all_tools = [*self.tools, *(t for kind in self.kinds.values() for t in kind.tools)]
        self._open: dict[int, tuple[EnvironmentKind, ToolSet]] = {}
        self._lock = threading.Lock()
        self._told: set[str] = set()  # tools whose first failure was logged

    @property
    def has_environments(self) -> bool:
        return bool(self.kinds)

    @property
    def num_left_behind(self) -> int:
        """Threads that still run a call that was given up."""
        return self.caller.num_left_behind

    def schemas(self, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Of the tools that a dataset row's trajectories have, as apply_chat_template takes them.

        Raises ValueError for a row of an unknown environment.
        """
        kind = kind_of(self.kinds, columns)
        return [tool.schema for tool in [*self.tools, *(kind.tools if kind else ())]]

    def rewards(self) -> list[Callable[..., Any]]:
        """A reward function for each class of environments that has `get_reward`."""
        return environment_rewards(self.kinds.values())

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise ValueError unless the dataset's columns are what the environments need."""
        columns = list(columns)
        if self.kinds and None not in self.kinds and NAME_COLUMN not in columns:
            raise ValueError(
                f"with a dict as environment_factory each row names its environment in the column "
                f"{NAME_COLUMN!r}, but the dataset has only {sorted(columns)}: add it, with one of "
                f"{', '.join(map(repr, self.kinds))}, or pass a single environment."
            )
        for kind in self.kinds.values():
            check_reset_takes(kind, columns)

    def open(self, rows: Sequence[Mapping[str, Any]]) -> list[Opened]:
        """A ToolSet per dataset row (every column of it), its environment reset for the row.

        Environments are reset at the same time. Each waits for its `close` before another
        trajectory gets it. Raises EnvironmentFailed for a `reset` that raises or hangs, ValueError
        for a row of an unknown environment.
        """
        taken = [self._take(row) for row in rows]
        resets = [
            self._reset(kind, made, row) for (kind, made, _), row in zip(taken, rows, strict=True)
        ]
        opened: list[Opened] = []
        for (kind, _, tool_set), reset, row in zip(taken, resets, rows, strict=True):
            text = row.get("prompt", EMPTY_PROMPT if kind else None)
            if kind is not None and reset is not None:
                text = self._with_observation(text, kind, reset)
            assert text is not None, row
            opened.append(Opened(tool_set, text))
        return opened

    def close(self, tool_sets: Iterable[ToolSet], *, reuse: bool = True) -> None:
        """Give the environments of these to whoever opens the next; one that a call still works on
        is left to it. reuse=False: something else does."""
        for tool_set in tool_sets:
            with self._lock:
                kind, _ = self._open.pop(id(tool_set), (None, None))
            if kind is not None and reuse and tool_set.is_free:
                kind.give_back(tool_set.environment)

    def end(self) -> None:
        """End the threads of the tools."""
        self.caller.close()

    def _take(self, row: Mapping[str, Any]) -> tuple[EnvironmentKind | None, Any, ToolSet]:
        kind = kind_of(self.kinds, row)
        environment = kind.take() if kind else None
        tools: list[Tool] = [*self.tools, *(kind.tools_of(environment) if kind else ())]
        tool_set = ToolSet(
            tools,
            self.caller,
            environment=environment,
            failure_ends=self.failure_ends,
            on_failure=self._tell_once,
        )
        if kind is not None:
            with self._lock:
                self._open[id(tool_set)] = (kind, tool_set)
        return kind, environment, tool_set

    def _reset(
        self, kind: EnvironmentKind | None, environment: Any, row: Mapping[str, Any]
    ) -> Future[Any] | None:
        if kind is None:
            return None
        given = {k: v for k, v in row.items() if kind.name is None or k != NAME_COLUMN}
        is_async = inspect.iscoroutinefunction(environment.reset)
        return self.caller.start(environment.reset, given, name="reset", is_async=is_async)

    def _with_observation(self, text: Any, kind: EnvironmentKind, reset: Future[Any]) -> Any:
        try:
            return with_observation(text, reset.result())
        except (Exception, SystemExit) as error:  # other processes do not hear of an exit
            raise EnvironmentFailed(
                f"{kind.label}.reset failed ({type(error).__name__}: {message_of(error)}), so that "
                "a trajectory cannot begin."
            ) from error

    def _tell_once(self, name: str, error: BaseException) -> None:
        """The first failure of each tool is logged, with where it came from; of all names that are
        no tool, which a model makes up as it likes, the first one."""
        known = any(name == tool.name for tool in self._all_tools)
        with self._lock:
            if (key := name if known else "") in self._told:
                return
            self._told.add(key)
        in_thread = "main thread" in message_of(error) or "same thread" in message_of(error)
        logger.warning(
            "A call of the tool %r failed (%s: %s). The model is told so; further failures of it "
            "are only counted, as tools/failure_frequency.%s",
            name,
            type(error).__name__,
            message_of(error),
            MAIN_THREAD_HINT if in_thread else "",
            exc_info=error if error.__traceback__ is not None else None,
        )
