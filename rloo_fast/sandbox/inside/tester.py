"""The process that runs one test. No line of the candidate's is executed here.

The names of the test that neither it nor its setup defines are the candidate's: they become handles
whose calls go over the pipe, and what comes back is plain data, rebuilt, or another handle.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from . import wire

MODULE = "tests"
RECORD_BYTES = 1024


def run(job: dict[str, str], result: int, requests: int, answers: int) -> None:
    """Write {"loaded": did the program run, "passed": did the test, "why": not} to `result`."""
    record = {"loaded": False, "passed": False, "why": ""}
    try:
        remote = Remote(requests, answers)
        remote.receive()  # of the program
        record["loaded"] = True
        _write(result, record)
        names = Names(remote, job["setup"], job["test"])
        exec(compile(job["setup"], "setup", "exec"), names)
        exec(compile(job["test"], "test", "exec"), names)
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
    if isinstance(error, EOFError | BrokenPipeError):
        return "ended"
    if isinstance(error, wire.Garbled):
        return "garbled answer"
    return "memory" if isinstance(error, MemoryError) else f"raised {type(error).__name__:.80}"


class Remote:
    """Requests to the candidate's process."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers = requests, answers

    def ask(self, operation: str, *arguments: Any) -> Any:
        encoded = [wire.encode(argument, _reference) for argument in arguments]
        wire.send(self._requests, [operation, encoded])
        try:
            return self.receive()
        except StopIteration as error:
            if operation == "next":
                raise
            # It would end a `map` of the test's, so that `all(map(f, cases))` holds.
            raise RuntimeError(f"StopIteration: {error}") from error

    def receive(self) -> Any:
        """The value of the answer; raises the built-in exception that is nearest to its own."""
        answer = wire.receive(self._answers)
        try:
            kind, *rest = answer
            if kind == "value":
                return wire.decode(rest[0], self._handle)
            names, text = rest
            known = (getattr(builtins, str(name), None) for name in names)
            error = next(e for e in known if isinstance(e, type) and issubclass(e, Exception))
        except (TypeError, ValueError, IndexError) as broken:
            raise wire.Garbled(f"no answer: {broken}") from broken
        except StopIteration:  # SystemExit, for one
            error = RuntimeError
            text = f"{names[0]}: {text}"
        raised = error.__new__(error)
        raised.args = (str(text),)
        raise raised

    def _handle(self, tag: str, rest: list[Any]) -> Handle:
        if tag != "handle" or not isinstance(rest[0], int):
            raise wire.Garbled(f"tag {tag!r}")
        return Handle(self, rest[0], str(rest[1]))


class Handle:
    """An object of the candidate's. It equals itself only, whatever its class says of others."""

    __slots__ = ("_kind", "_number", "_remote")

    def __init__(self, remote: Remote, number: int, kind: str) -> None:
        for name, value in (("_remote", remote), ("_number", number), ("_kind", kind)):
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)

    def __repr__(self) -> str:
        return f"<{self._kind} of the candidate>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._remote.ask("call", self, list(args), kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._remote.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._remote.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._remote.ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._remote.ask("setitem", self, key, value)

    def __len__(self) -> int:
        return self._remote.ask("len", self)

    def __bool__(self) -> bool:
        return self._remote.ask("bool", self) is True

    def __str__(self) -> str:
        return self._remote.ask("str", self)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._remote.ask("iter", self)
        while True:
            try:
                yield self._remote.ask("next", iterator)
            except StopIteration:
                return

    def __next__(self) -> Any:
        return self._remote.ask("next", self)


def _reference(value: Any) -> list[Any]:
    """What stands for a handle, and for what the candidate's process has too: built-in functions,
    and the setup's functions, classes and their instances (of which the attributes are copied)."""
    if isinstance(value, Handle):
        return ["handle", value._number]
    name = getattr(value, "__name__", "")
    if getattr(builtins, name, None) is value or (name.isidentifier() and _in_setup(value)):
        return ["name", name]
    if _in_setup(type(value)):
        return ["copy", type(value).__name__, wire.encode(vars(value), _reference)]
    raise TypeError(f"a test cannot pass a {type(value).__name__} to a candidate: {value!r:.80}")


def _in_setup(value: Any) -> bool:
    return getattr(value, "__module__", None) == MODULE


class Names(dict):
    """Global names of a test: its own, then built-in ones, then the candidate's.

    If the candidate's names came before, its `abs` or `math.isclose` would judge its own answers.
    So a built-in name is the candidate's only in a test that has no other name at all, and what is
    used like a module of the standard library is that, without an import, too.
    """

    def __init__(self, remote: Remote, setup: str, test: str) -> None:
        super().__init__(__name__=MODULE)
        self._remote = remote
        bases = [n.value for n in _nodes(setup) + _nodes(test) if isinstance(n, ast.Attribute)]
        self._modules = {n.id for n in bases if isinstance(n, ast.Name)} & sys.stdlib_module_names
        names = [node for node in _nodes(test) if isinstance(node, ast.Name)]
        stored = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
        free = {name.id for name in names} - stored
        self._tested = free if len(free) == 1 else set()

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or (hasattr(builtins, name) and name not in self._tested):
            raise KeyError(name)
        if name in self._modules:
            return importlib.import_module(name)
        return self._remote.ask("name", name)


def _nodes(code: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(code)))
