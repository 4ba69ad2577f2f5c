"""Environments: objects with a state of their own, one per trajectory, whose methods are tools.

The rules are those of TRL 1.16. An environment has `reset(**row)`, which is called before every
trajectory with the columns of its dataset row and returns None or a text, which is put behind the
row's last message. Every other method whose name has no leading underscore is a tool, but for
`get_reward()`: that, if there is one, is a reward of the trajectory.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .functions import Tool, check_names, tools_of

Factory = Callable[[], Any]
EnvironmentFactory = Factory | dict[str, Factory]

NAME_COLUMN = "environment"  # which of several environments a row is for
NO_TOOLS = ("reset", "get_reward")


@dataclass
class EnvironmentKind:
    """What one factory makes; instances that no trajectory has wait in `free`."""

    name: str | None  # None: there is one kind, for all rows
    factory: Factory
    type: type
    methods: tuple[str, ...]  # that are tools
    tools: list[Tool]  # of the first instance: for their schemas
    free: list[Any]
    has_reward: bool
    lock: threading.Lock = field(default_factory=threading.Lock)
    making: threading.Lock = field(default_factory=threading.Lock)  # a factory may count

    @property
    def label(self) -> str:
        return self.type.__name__

    def take(self) -> Any:
        """An instance that nobody else has."""
        with self.lock:
            if self.free:
                return self.free.pop()
        with self.making:
            return _made(self.factory, self.name)

    def give_back(self, environment: Any) -> None:
        with self.lock:
            self.free.append(environment)

    def tools_of(self, environment: Any) -> list[Tool]:
        """Those of this instance, with the schemas that all have."""
        made = zip(self.tools, self.methods, strict=True)
        return [replace(tool, function=getattr(environment, method)) for tool, method in made]


def find_environments(factory: EnvironmentFactory | None) -> dict[str | None, EnvironmentKind]:
    """By name; {None: the only one} of a factory that is no dict, {} without one.

    Makes an instance of each. Raises TypeError or ValueError for what cannot be an environment.
    """
    if factory is None:
        return {}
    factories: dict[Any, Any] = factory if isinstance(factory, dict) else {None: factory}
    if not factories:
        raise ValueError(
            "environment_factory is an empty dict: give an environment for every name in the "
            f"column {NAME_COLUMN!r}, or leave it out."
        )
    return {name: _kind(name, each) for name, each in factories.items()}


def check_reset_takes(kind: EnvironmentKind, columns: Iterable[str]) -> None:
    """Raise ValueError unless `reset` can be called with these columns as keywords."""
    columns = [name for name in columns if kind.name is None or name != NAME_COLUMN]
    reset = (kind.free[0] if kind.free else kind.type).reset
    try:
        inspect.signature(reset).bind(**dict.fromkeys(columns))
    except TypeError as error:
        raise ValueError(
            f"{kind.label}.reset is called with the columns of a dataset row ({error}); the "
            f"dataset has {', '.join(map(repr, columns)) or 'none'}. Write: "
            "def reset(self, **row)"
        ) from error
    except ValueError:  # it has no signature: a wrong call will tell
        return


def environment_rewards(kinds: Iterable[EnvironmentKind]) -> list[Callable[..., Any]]:
    """A reward function per class that has `get_reward`, by the name of the class: what it says of
    a trajectory in one of its objects, None of any other."""
    types = dict.fromkeys(kind.type for kind in kinds if kind.has_reward)
    return [_reward_of(each) for each in types]


def _reward_of(kind: type) -> Callable[..., Any]:
    async def of_async(environments: list[Any], **kwargs: Any) -> list[Any]:
        return [await e.get_reward() if type(e) is kind else None for e in environments]

    def of_each(environments: list[Any], **kwargs: Any) -> list[Any]:
        return [e.get_reward() if type(e) is kind else None for e in environments]

    is_async = inspect.iscoroutinefunction(getattr(kind, "get_reward", None))
    reward = of_async if is_async else of_each
    reward.__name__ = kind.__name__
    return reward


def _kind(name: str | None, factory: Any) -> EnvironmentKind:
    where = "environment_factory" if name is None else f"environment_factory[{name!r}]"
    if not callable(factory):
        raise TypeError(
            f"{where} must be a callable that makes an environment, such as its class, got "
            f"{type(factory).__name__}."
        )
    instance = _made(factory, name)
    kind = type(instance)
    # of the class: of the object, properties would be run
    members = [member for member, _ in inspect.getmembers(kind, predicate=inspect.isfunction)]
    if "reset" not in members:
        raise ValueError(
            f"{where} makes a {kind.__name__}, which has no method `reset`: write def reset(self, "
            "**row), which is called before every trajectory and returns None, or a text for the "
            "end of the prompt."
        )
    methods = tuple(m for m in members if m not in NO_TOOLS and not m.startswith("_"))
    tools = tools_of((getattr(instance, method) for method in methods), kind.__name__)
    check_names(tools, kind.__name__)
    has_reward = "get_reward" in members
    return EnvironmentKind(name, factory, kind, methods, tools, [instance], has_reward)


def _made(factory: Factory, name: str | None) -> Any:
    try:
        return factory()
    except Exception as error:
        where = "environment_factory" if name is None else f"environment_factory[{name!r}]"
        raise ValueError(f"{where} raised {type(error).__name__}: {error}") from error


def with_observation(messages: list[dict[str, Any]], observation: Any) -> list[dict[str, Any]]:
    """The messages with what `reset` returned at the end of the last one; they stay as they are.

    Raises TypeError for anything but a text or a list of content blocks.
    """
    if observation is None:
        return messages
    if not isinstance(observation, str | list):
        raise TypeError(
            "reset must return None or a text, which is put behind the last message of the prompt, "
            f"got {type(observation).__name__}: {observation!r:.80}."
        )
    content: Any = messages[-1]["content"]
    if isinstance(content, list) != isinstance(observation, list):
        content, observation = _blocks(content), _blocks(observation)
    return [*messages[:-1], {**messages[-1], "content": content + observation}]


def _blocks(content: Any) -> list[dict[str, Any]]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def kind_of(
    kinds: Mapping[str | None, EnvironmentKind], columns: Mapping[str, Any]
) -> EnvironmentKind | None:
    """That of a dataset row. Raises ValueError for a name that is not among them."""
    if not kinds:
        return None
    if None in kinds:
        return kinds[None]
    name = columns.get(NAME_COLUMN)
    if name not in kinds:
        raise ValueError(
            f"a dataset row has {NAME_COLUMN}={name!r}, which is not among the environments of "
            f"environment_factory: {', '.join(map(repr, kinds))}."
        )
    return kinds[name]
