"""Python files that a setting names, as in "path/to/file.py:function", loaded as modules."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .paths import user_path


def run_file(name: str, path: str | Path) -> ModuleType:
    """The module `name`, from `path` the first time; raises what its code raises."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_module(where: str, what: str) -> ModuleType:
    """ "package.module" or "path/to/file.py" -> the module; `what` names it in the ValueError."""
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        path = user_path(where).resolve(strict=True)
        return run_file(f"rloo_fast_file_{path.stem}_{abs(hash(path))}", path)
    except Exception as error:  # a module can raise anything
        raise ValueError(f"{what} could not be loaded: {type(error).__name__}: {error}") from error


def load_function(named: Any, what: str) -> Any:
    """The function of "package.module:function" or "path/to/file.py:function"; `what` names it in
    the ValueError."""
    where, colon, name = named.rpartition(":") if isinstance(named, str) else ("", "", "")
    if not (where and colon and name):
        raise ValueError(
            f"{what} must be 'package.module:function' or 'path/to/file.py:function', got "
            f"{named!r}: a run that is resumed finds it by its name."
        )
    function = getattr(load_module(where, f"{what}={named!r}"), name, None)
    if not callable(function):
        raise ValueError(f"{what}={named!r}: {where} has no function {name!r}.")
    return function
