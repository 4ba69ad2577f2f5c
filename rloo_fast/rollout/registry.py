"""Rollout engines by name. A new one is a subclass of RolloutEngine in a file of its own:

    @register_engine("mine")
    class MyEngine(RolloutEngine): ...

A run asks for it as rollout_engine="mine" where that file has been imported, and otherwise as
"file.py:mine" or "package.module:mine". Without the decorator the class's own name takes its place.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from typing import TypeVar

from ..config.code_files import load_module
from .engine import RolloutEngine

Engine = TypeVar("Engine", bound=type[RolloutEngine])

# name -> class, or where it is: modules of engines are imported when one is asked for
ENGINES: dict[str, type[RolloutEngine] | str] = {
    "transformers": "rloo_fast.rollout.hf:HFEngine",
    "vllm": "rloo_fast.rollout.vllm.colocate:VLLMEngine",
    "vllm_server": "rloo_fast.rollout.vllm.server:VLLMServer",
    "vllm_servers": "rloo_fast.rollout.vllm.servers:VLLMServers",
}


def register_engine(name: str) -> Callable[[Engine], Engine]:
    """Class decorator: rollout_engine=`name` is this engine from now on.

    Raises ValueError for a name that another class has.
    """

    def register(engine: Engine) -> Engine:
        known = ENGINES.get(name)
        # the same class again: its file was run under another module name
        if known is not None and (isinstance(known, str) or _source(known) != _source(engine)):
            raise ValueError(f"a rollout engine named {name!r} is registered already: {known!r}.")
        ENGINES[name] = engine
        return engine

    return register


def _source(engine: type[RolloutEngine]) -> tuple[str, str | None]:
    return engine.__qualname__, getattr(sys.modules.get(engine.__module__), "__file__", None)


def find_engine(name: str) -> type[RolloutEngine]:
    """The engine that `name` stands for: one of ENGINES, "module:name" or "file.py:name".

    The module's name is that of a class, or one that a class in it is registered by. Raises
    ValueError for what is no engine, with the known names.
    """
    found = ENGINES.get(name, name)
    if not isinstance(found, str):
        return found
    where, _, member = found.rpartition(":")
    if not where:
        near = difflib.get_close_matches(name, ENGINES, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"rollout_engine={name!r} is not known.{meant} It is one of "
            f"{', '.join(map(repr, ENGINES))}, 'package.module:Engine' or 'path/to/file.py:Engine'."
        )
    module = load_module(where, f"rollout_engine={name!r}")
    engine = getattr(module, member, None) or ENGINES.get(member)
    if not (isinstance(engine, type) and issubclass(engine, RolloutEngine)):
        raise ValueError(
            f"rollout_engine={name!r}: there is no subclass of RolloutEngine named {member!r} in "
            f"{where}."
        )
    return engine
