"""A function run inside a module's forward, so that engine hooks fire; a forward without hooks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def run_inside(wrapped: nn.Module, module: nn.Module, function: Callable[[], Any]) -> Any:
    """function(), run as `module`'s forward in a call of `wrapped`, so that the hooks of both fire.

    The result passes through the hooks. The function takes no arguments, because engines cast and
    move the arguments of a forward.
    """
    own = module.__dict__.get("forward")  # accelerate may have put its own there

    def restore() -> None:
        if own is not None:
            module.forward = own
        else:
            module.__dict__.pop("forward", None)

    def once(*_: Any, **__: Any) -> Any:
        restore()
        return function()

    module.forward = once
    try:
        return wrapped(None)  # without any argument DDP would fail on a GPU
    finally:
        restore()


@contextmanager
def without_hooks(model: nn.Module, package: str) -> Iterator[None]:
    """While open, no forward hook that `package` put on a module of `model` is called."""
    kept = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            theirs = {key: hook for key, hook in hooks.items() if _is_of(hook, package)}
            if theirs:
                kept.append((hooks, OrderedDict(hooks)))
                for key in theirs:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, all_of_them in kept:
            hooks.clear()
            hooks.update(all_of_them)


def _is_of(hook: Any, package: str) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(package)
