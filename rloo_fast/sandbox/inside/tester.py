"""The process that runs one test. No line of the candidate's is executed here.

The names of the test that neither it nor its setup defines are the candidate's: they become handles
whose calls go over the pipe, and what comes back is plain data, rebuilt, or another handle. A test
that asks the candidate nothing says nothing about it: it cannot be passed.
"""

from __future__ import annotations

import ast
import builtins
import copy
import importlib
import json
import os
import sys
from typing import Any

from . import wire
from .collected import Collected
from .judged import JUDGE, Judge, Unaskable
from .remote import Ended, Remote

MODULE = "tests"
RECORD_BYTES = 4096
MAX_WHY = 200  # characters, of at most 12 bytes each


def run(job: dict[str, str], result: int, requests: int, answers: int) -> None:
    """Write {"loaded": did the program run, "passed": did the test, "why": not} to `result`."""
    record = {"loaded": False, "passed": False, "why": ""}
    try:
        judge = Judge()
        remote = Remote(requests, answers, job["setup"], judge)
        remote.receive()  # of the program
        record["loaded"] = True
        _write(result, record)
        setup, test = judge.code(job["setup"], "setup"), judge.code(job["test"], "test")
        names = Names(remote, job["setup"], job["test"])
        names[JUDGE] = judge
        tests = Collected(judge, names)
        tests.prepare([job["setup"], job["test"]])
        remote.setup = names
        exec(setup, names)
        remote.setup = dict(names)  # without what the test adds
        names.update(__name__="__main__", __file__="test")  # a test is run as a script is
        exec(test, names)
        tests.run(job["test"])
        if not remote.was_asked and judge.problem is None:
            raise Unaskable("it asks the program nothing")
        judge.conclude()
        record["passed"] = True
    except BaseException as error:
        record["why"] = _why(error, record["loaded"])
    _write(result, record)


def _write(result: int, record: dict[str, Any]) -> None:
    os.pwrite(result, json.dumps(record).encode().ljust(RECORD_BYTES), 0)  # all of it, or nothing


def _why(error: BaseException, loaded: bool) -> str:
    if isinstance(error, AssertionError) and loaded:
        return "wrong answer"
    if isinstance(error, SyntaxError) and not loaded:
        return "syntax error"
    if isinstance(error, Ended):
        return "ended"
    if isinstance(error, wire.Garbled):
        return "garbled answer"
    if isinstance(error, SystemExit):  # the program's arrives as a RuntimeError
        error = Unaskable("it ends itself, whatever the program")
    if isinstance(error, Unaskable):
        return f"unaskable test: {error}"[:MAX_WHY]
    if isinstance(error, ModuleNotFoundError) and error.name:  # else it came from the program
        return f"unaskable test: there is no module {error.name} here"[:MAX_WHY]
    return "memory" if isinstance(error, MemoryError) else f"raised {type(error).__name__:.80}"


class Names(dict):
    """Global names of a test: its own, then built-in ones, then the candidate's.

    If the candidate's names came before, its `abs` or `math.isclose` would judge its own answers.
    So a built-in name is the candidate's only in a test that has no other name at all, and what is
    used like a module of the standard library is that, without an import, too.
    """

    def __init__(self, remote: Remote, setup: str, test: str) -> None:
        super().__init__(__name__=MODULE)
        self._remote = remote
        nodes = _nodes(setup) + _nodes(test)
        bases = [node.value for node in nodes if isinstance(node, ast.Attribute)]
        self._modules = {n.id for n in bases if isinstance(n, ast.Name)} & sys.stdlib_module_names
        names = [node for node in _nodes(test) if isinstance(node, ast.Name)]
        stored = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
        free = {name.id for name in names} - stored
        self._tested = free if len(free) == 1 else set()
        caught = [node for kind in _caught(nodes) for node in ast.walk(kind)]
        remote.caught = {node.id for node in caught if isinstance(node, ast.Name)}

    def copy(self) -> Names:  # doctest runs examples in one
        return copy.copy(self)

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or (hasattr(builtins, name) and name not in self._tested):
            raise KeyError(name)
        if name in self._modules:
            return importlib.import_module(name)
        if name in self._remote.caught:
            return self._remote.exception(name)
        return self._remote.ask("name", name)


def _nodes(code: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(code)))


def _caught(nodes: list[ast.AST]) -> list[ast.AST]:
    """Expressions of the exceptions that `except`, `raises(...)`, `assertRaises(...)` name."""
    caught: list[ast.AST] = []
    for node in nodes:
        if isinstance(node, ast.ExceptHandler) and node.type:
            caught.append(node.type)
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
            caught += (
                node.args[:1] if name in ("raises", "assertRaises", "assertRaisesRegex") else []
            )
    return caught
