"""Reward functions in files that are no modules of a package: "path/to/file.py:function"."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..config.code_files import run_file

PREFIX = "rloo_fast_reward_"


def load_file(path: Path, text: str) -> ModuleType:
    """The file as a module; `text` is how the configuration names it. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"The reward {text!r} names a file that does not exist: {path}.")
    path = path.resolve()
    # One module per version of a file: functions of a file share its globals, an edit is seen.
    name = f"{PREFIX}{path.stem}_{abs(hash((path, path.stat().st_mtime_ns)))}"
    try:
        return run_file(name, path)
    except Exception as error:
        raise ValueError(
            f"The reward {text!r} could not be loaded: {type(error).__name__}: {error}"
        ) from error


def innermost(function: Callable[..., Any]) -> Any:
    """What a functools.partial of a partial ... calls in the end."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def files_of(functions: Iterable[Callable[..., Any]]) -> dict[str, str]:
    """Module name -> path of the files that hold these functions, for run_file elsewhere."""
    names = {getattr(innermost(function), "__module__", None) or "" for function in functions}
    return {name: str(sys.modules[name].__file__) for name in names if name.startswith(PREFIX)}
