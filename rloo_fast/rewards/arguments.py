"""reward_kwargs: arguments of rewards that are named by strings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..masking import masked, masked_values, shown


def check_reward_kwargs(kwargs: Mapping[str, Any], reward_funcs: Sequence[Any]) -> None:
    """Raise ValueError unless every key is a string in `reward_funcs`, its value a dict."""
    names = [func for func in reward_funcs if isinstance(func, str)]
    for name, arguments in kwargs.items():
        if name not in names:
            there = ", ".join(map(repr, names)) or "no names, only objects (use functools.partial)"
            raise ValueError(f"reward_kwargs has {name!r}, but reward_funcs has {there}.")
        if not isinstance(arguments, dict):
            raise ValueError(
                f"reward_kwargs is a dict of dicts, as in {{{name!r}: {{'scale': 2}}}}, but "
                f"{name!r} has {shown(arguments)}."
            )


def bind(name: str, target: Callable[..., Any], arguments: dict[str, Any]) -> Callable[..., Any]:
    """A function with these arguments for every call, or the object that a class makes of them.

    Raises ValueError for arguments that it does not take, and for what the class raises.
    """
    if arguments:
        parameters = inspect.signature(target).parameters.values()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        check_arguments(name, [p.name for p in parameters if p.kind in named], arguments)
    if not inspect.isclass(target):
        return functools.partial(target, **arguments) if arguments else target
    try:
        made: Any = target(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The reward {name!r} could not be made with reward_kwargs {{{name!r}: "
            f"{masked_values(arguments)}}}: {masked(str(error))}"
        ) from error
    return made


def check_arguments(name: str, taken: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that is not among those `taken` by name.

    One that would disappear in **kwargs, which every reward function has, is mostly misspelt.
    """
    if unknown := [argument for argument in arguments if argument not in taken]:
        raise ValueError(
            f"reward_kwargs: {name!r} takes no {', '.join(map(repr, unknown))}. It takes "
            f"{', '.join(map(repr, taken)) or 'none'}."
        )
