"""A test's end of the pipes to the candidate's process: questions, and handles of its objects."""

from __future__ import annotations

import builtins
import importlib
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import wire
from .judged import Judge, Unaskable
from .setup import Setup

NOT_ASKED = ("name", "share", "bases")  # say nothing about what the program does
GROUPS = (ExceptionGroup,)  # cannot be made of a text alone


class Ended(BaseException):
    """The candidate's process has. No `except Exception` of a test takes it for an answer."""


class Remote:
    """Requests to the candidate's process."""

    def __init__(self, requests: int, answers: int, setup: str, judge: Judge) -> None:
        self._requests, self._answers, self._judge = requests, answers, judge
        self._handles: dict[int, Handle] = {}
        self._source = Setup(setup)
        self._shared: set[str] = set()  # names that the candidate's process was given
        self._of_names: set[int] = set()  # handles of what the program has defined
        self._exceptions: dict[str, type[Exception]] = {}
        self.caught: set[str] = set()  # names by which the test catches exceptions
        self.setup: dict[str, Any] = {}
        self.was_asked = False  # for more than a handle of a name

    def ask(self, operation: str, *arguments: Any) -> Any:
        """What the candidate answers, or raises. Faults (not: what it raises) fail the test, even
        where the test catches them."""
        try:
            return self._ask(operation, arguments)
        except (Ended, Unaskable, wire.Garbled) as error:
            raise self._judge.fault(error) from None

    def _ask(self, operation: str, arguments: Sequence[Any]) -> Any:
        try:
            encoded = [wire.encode(argument, self._reference) for argument in arguments]
            wire.send(self._requests, [operation, encoded])
        except (RecursionError, ValueError) as error:
            raise Unaskable(f"an argument cannot be sent: {error}") from error
        except BrokenPipeError as error:
            raise Ended from error
        try:
            value = self.receive()
        except StopIteration as error:
            self.was_asked = True
            if operation == "next":
                raise
            # It would end a `map` of the test's, so that `all(map(f, cases))` holds.
            raise RuntimeError(f"StopIteration: {error}") from error
        except Exception:
            self.was_asked |= operation not in NOT_ASKED
            raise
        if operation == "name" and isinstance(value, Handle):
            self._of_names.add(_number(value))
        else:
            about = arguments[0] if arguments else None
            of_name = isinstance(about, Handle) and _number(about) in self._of_names
            self.was_asked |= operation not in NOT_ASKED and not (operation == "bool" and of_name)
        return value

    def receive(self) -> Any:
        """The value of the answer; raises the exception that is nearest to the candidate's."""
        try:
            answer = wire.receive(self._answers)
        except EOFError as error:
            raise Ended from error
        try:
            kind, *rest = answer
            if kind == "value":
                return wire.decode(rest[0], self._handle)
            names, text = rest
            raised = self._nearest(names)()
        except (TypeError, ValueError, IndexError) as broken:
            raise wire.Garbled(f"no answer: {broken}") from broken
        except LookupError:  # SystemExit, for one
            raised, text = RuntimeError(), f"{names[0]}: {text}"
        raised.args = (str(text),)
        raise raised

    def exception(self, name: str) -> Any:
        """A class to catch what the program raises of its own class of this name."""
        try:
            self._nearest(self.ask("bases", self.ask("name", name)))
            return self._exceptions[name]
        except (AttributeError, LookupError, TypeError) as error:
            raise self._judge.fault(Unaskable(f"{name} is caught, and no exception")) from error

    def _nearest(self, names: Sequence[str]) -> type[Exception]:
        """Of the names of an exception's classes. Raises LookupError where none is a built-in one.

        A class of the program's own that the test catches by its name is made here, with its bases.
        """
        kind: type[Exception] | None = None
        is_caught = not self.caught.isdisjoint(names)
        for name in reversed(names):
            known = getattr(builtins, name, None)
            if isinstance(known, type) and issubclass(known, Exception) and known not in GROUPS:
                kind = known
            elif kind and is_caught and known is None:
                kind = self._exceptions.setdefault(name, type(name, (kind,), {}))
        if kind is None:
            raise LookupError
        return kind

    def _handle(self, tag: str, rest: list[Any]) -> Handle:
        if tag != "handle" or not isinstance(rest[0], int):
            raise wire.Garbled(f"tag {tag!r}")
        # One for each object, so that `is` holds, too.
        return self._handles.setdefault(rest[0], Handle(self, rest[0]))

    def _reference(self, value: Any) -> list[Any]:
        """What stands for a handle, and for what the candidate's process has too, or is given now:
        functions and classes of the standard library and of the setup, and instances of the
        latter's (of which the attributes are copied)."""
        if isinstance(value, Handle):
            return ["handle", _number(value)]
        if path := _path_in_library(value):
            return ["library", *path]
        name, kind = getattr(value, "__name__", None), type(value)
        if name in self.setup and self.setup[name] is value:
            self._share(name)
            return ["name", name]
        if self.setup.get(kind.__name__) is kind and hasattr(value, "__dict__"):
            self._share(kind.__name__)
            return ["copy", kind.__name__, wire.encode(vars(value), self._reference)]
        raise Unaskable(f"an argument of type {kind.__name__} cannot be sent to a program")

    def _share(self, name: str) -> None:
        if name not in self._shared:
            self._shared.add(name)
            try:
                self.ask("share", self._source.closure(name))
            except Exception as error:
                raise Unaskable(f"{name} of the setup cannot be sent: {error!r:.100}") from error


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
    Its own attributes have names that no object of the candidate's has.
    """

    __slots__ = ("__number", "__remote")

    def __init__(self, remote: Remote, number: int) -> None:
        for name, value in (("remote", remote), ("number", number)):
            object.__setattr__(self, f"_Handle__{name}", value)

    def __eq__(self, other: object) -> Any:
        if not isinstance(other, Handle):
            return NotImplemented
        return other.__number == self.__number or self.__remote.ask("eq", self, other)

    def __hash__(self) -> int:
        return hash(self.__number)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Handle) and self.__remote.ask("isinstance", value, self) is True

    def __repr__(self) -> str:
        return self.__remote.ask("repr", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__remote.ask("call", self, list(args), kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__remote.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__remote.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self.__remote.ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__remote.ask("setitem", self, key, value)

    def __len__(self) -> int:
        return self.__remote.ask("len", self)

    def __bool__(self) -> bool:
        return self.__remote.ask("bool", self) is True

    def __str__(self) -> str:
        return self.__remote.ask("str", self)

    def __iter__(self) -> Iterator[Any]:
        iterator = self.__remote.ask("iter", self)
        while True:
            try:
                yield self.__remote.ask("next", iterator)
            except StopIteration:
                return

    def __next__(self) -> Any:
        return self.__remote.ask("next", self)


def _between_handles(name: str) -> Callable[[Handle, object], Any]:
    def method(self: Handle, other: object) -> Any:
        return _remote(self).ask(name, self, other) if isinstance(other, Handle) else NotImplemented

    return method


_number, _remote = operator.attrgetter("_Handle__number"), operator.attrgetter("_Handle__remote")


for _name in set(wire.OPERATORS) - {"eq"}:
    setattr(Handle, f"__{_name.strip('_')}__", _between_handles(_name))
