"""The process that runs one test. No line of the candidate's is executed here.

The names of the test that neither it nor its setup defines are the candidate's: they become handles
whose calls go over the pipe, and what comes back is plain data, rebuilt, or another handle.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import operator
import os
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from . import wire

MODULE = "tests"
RECORD_BYTES = 4096
MAX_WHY = 200  # characters, of at most 12 bytes each


def run(job: dict[str, str], result: int, requests: int, answers: int) -> None:
    """Write {"loaded": did the program run, "passed": did the test, "why": not} to `result`."""
    record = {"loaded": False, "passed": False, "why": ""}
    try:
        remote = Remote(requests, answers)
        remote.receive()  # of the program
        record["loaded"] = True
        _write(result, record)
        setup, test = _code(job["setup"], "setup"), _code(job["test"], "test")
        names = Names(remote, job["setup"], job["test"])
        remote.setup = names
        exec(setup, names)
        remote.setup = dict(names)  # without what the test adds
        exec(test, names)
        record["passed"] = True
    except BaseException as error:
        record["why"] = _why(error, record["loaded"])
    _write(result, record)


class Unaskable(BaseException):
    """A test cannot be asked here, whatever the program. `except Exception` does not catch it."""


def _code(text: str, name: str) -> CodeType:
    try:
        # Not with this file's own `from __future__ import annotations`.
        return compile(text, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise Unaskable(f"{type(error).__name__} in the {name}: {error}") from error


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
    if isinstance(error, Unaskable):
        return f"unaskable test: {error}"[:MAX_WHY]
    if isinstance(error, ModuleNotFoundError) and error.name:  # else it came from the program
        return f"unaskable test: there is no module {error.name} here"[:MAX_WHY]
    return "memory" if isinstance(error, MemoryError) else f"raised {type(error).__name__:.80}"


class Remote:
    """Requests to the candidate's process."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers = requests, answers
        self._handles: dict[int, Handle] = {}
        self.setup: dict[str, Any] = {}  # its names: the candidate's process has them, too

    def ask(self, operation: str, *arguments: Any) -> Any:
        try:
            encoded = [wire.encode(argument, self._reference) for argument in arguments]
            wire.send(self._requests, [operation, encoded])
        except (RecursionError, ValueError) as error:
            raise Unaskable(f"an argument cannot be sent: {error}") from error
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
        # One for each object, so that `is` holds, too.
        return self._handles.setdefault(rest[0], Handle(self, rest[0]))

    def _reference(self, value: Any) -> list[Any]:
        """What stands for a handle, and for what the candidate's process has too: functions and
        classes of the standard library and of the setup, and instances of the latter's (of which
        the attributes are copied)."""
        if isinstance(value, Handle):
            return ["handle", value._number]
        if path := _path_in_library(value):
            return ["library", *path]
        name, kind = getattr(value, "__name__", None), type(value)
        if name in self.setup and self.setup[name] is value:
            return ["name", name]
        if self.setup.get(kind.__name__) is kind and hasattr(value, "__dict__"):
            return ["copy", kind.__name__, wire.encode(vars(value), self._reference)]
        raise Unaskable(f"an argument of type {kind.__name__} cannot be sent to a program")


def _path_in_library(value: Any) -> tuple[str, str] | None:
    """("builtins", "str.upper") of a function, a method or a class that is found by it."""
    module = getattr(getattr(value, "__objclass__", value), "__module__", None)
    path = getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(path, str):
        return None
    if module.split(".")[0] not in sys.stdlib_module_names:
        return None
    try:
        found = operator.attrgetter(path)(importlib.import_module(module))
    except (AttributeError, ImportError):
        return None
    return (module, path) if found == value else None


class Handle:
    """An object of the candidate's. It equals nothing of the test's, whatever its class says.

    What two of them are to each other (see wire.OPERATORS), the candidate says: it made both.
    """

    __slots__ = ("_number", "_remote")

    def __init__(self, remote: Remote, number: int) -> None:
        for name, value in (("_remote", remote), ("_number", number)):
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> Any:
        if not isinstance(other, Handle):
            return NotImplemented
        return other._number == self._number or self._remote.ask("eq", self, other)

    def __hash__(self) -> int:
        return hash(self._number)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Handle) and self._remote.ask("isinstance", value, self) is True

    def __repr__(self) -> str:
        return self._remote.ask("repr", self)

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


def _between_handles(name: str) -> Callable[[Handle, object], Any]:
    def method(self: Handle, other: object) -> Any:
        return self._remote.ask(name, self, other) if isinstance(other, Handle) else NotImplemented

    return method


for _name in set(wire.OPERATORS) - {"eq"}:
    setattr(Handle, f"__{_name.strip('_')}__", _between_handles(_name))


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
        handlers = [node.type for node in nodes if isinstance(node, ast.ExceptHandler)]
        caught = [node for kind in handlers if kind for node in ast.walk(kind)]
        self._caught = {node.id for node in caught if isinstance(node, ast.Name)}

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or (hasattr(builtins, name) and name not in self._tested):
            raise KeyError(name)
        if name in self._modules:
            return importlib.import_module(name)
        if name in self._caught:
            raise Unaskable(f"an exception of the program's own class cannot be caught: {name}")
        return self._remote.ask("name", name)


def _nodes(code: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(code)))
