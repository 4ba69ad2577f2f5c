"""The process that runs a candidate's program, and answers the tests' requests about it.

Nothing here needs to be believed: the program may change all of it, and then answers for itself.
"""

from __future__ import annotations

import _sitebuiltins
import builtins
import importlib
import linecache
import operator
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

from . import wire

MODULE = "candidate"  # so that `if __name__ == "__main__":` is skipped


def run(job: dict[str, str], requests: int, answers: int) -> None:
    """Execute job["shared"] and job["program"], report, then answer until the requests end.

    "shared": what the program may have of the setup of its tests, see setup.Setup.shared.
    """
    module = sys.modules[MODULE] = ModuleType(MODULE)
    module.__file__ = MODULE
    sys.argv = [MODULE]
    for name in ("exit", "quit"):  # as Python's module `site` adds them
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    setattr(builtins, "help", _sitebuiltins._Helper())  # noqa: B010
    candidate = Candidate(vars(module))
    with suppress(BaseException):  # a module that is not there: the program may not need it
        candidate.share(job["shared"])
    wire.send(answers, candidate.outcome("execute", [job["program"]]))
    with suppress(EOFError, BrokenPipeError):
        while True:
            operation, arguments = wire.receive(requests)
            wire.send(answers, candidate.outcome(operation, arguments))


class Candidate:
    """The names of the program, and the objects that the tests have handles of."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}  # id of an object -> its place
        self._given: dict[str, Any] = {}  # of the setup
        self._operations = {
            "execute": self._execute,
            "share": self.share,
            "name": names.__getitem__,
            "call": lambda function, args, kwargs: function(*args, **kwargs),
            **{"getattr": getattr, "setattr": setattr, "getitem": operator.getitem},
            **{"setitem": operator.setitem, "len": len, "bool": bool, "str": str},
            "bases": lambda kind: [base.__name__ for base in kind.__mro__],
            **{"iter": iter, "next": next, "repr": repr, "isinstance": isinstance},
            **{name: getattr(operator, name) for name in wire.OPERATORS},
        }

    def share(self, source: str) -> None:
        """Execute definitions of the setup. The program's own names stay as they are."""
        space = dict(self.names)
        exec(compile(source, "setup", "exec", dont_inherit=True), space)
        for name, value in space.items():
            if self.names.get(name, self) is not value:
                self._given[name] = value
                self.names.setdefault(name, value)

    def _execute(self, program: str) -> None:
        # For inspect.getsource, as of a module that was read from a file.
        linecache.cache[MODULE] = (len(program), None, program.splitlines(True), MODULE)
        # Not with this file's own `from __future__ import annotations`.
        code = compile(program, MODULE, "exec", dont_inherit=True)
        try:
            exec(code, self.names)
        except SystemExit as end:  # of a script that is done; what it has defined is there
            if end.code not in (None, 0):
                raise
        except EOFError:  # as is what a script has defined that then asks for `input()`
            pass

    def outcome(self, operation: str, arguments: list[Any]) -> list[Any]:
        """["value", it] or ["raised", the names of the exception's classes, its text]."""
        try:
            values = [wire.decode(argument, self._object) for argument in arguments]
            return ["value", wire.encode(self._operations[operation](*values), self._handle)]
        except BaseException as error:  # SystemExit, too: a program cannot end by it
            names = [kind.__name__ for kind in type(error).__mro__]
            text = ""
            with suppress(BaseException):
                text = str(error)[:200]
            return ["raised", names, text]

    def _handle(self, value: Any) -> list[Any]:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return ["handle", self._numbers[id(value)]]

    def _object(self, tag: str, rest: list[Any]) -> Any:
        if tag == "handle":
            return self._objects[rest[0]]
        if tag == "name":
            return self._given[rest[0]]
        if tag == "library":
            return operator.attrgetter(rest[1])(importlib.import_module(rest[0]))
        kind, attributes = self.names[rest[0]], wire.decode(rest[1], self._object)
        copy = object.__new__(kind)
        vars(copy).update(attributes)
        return copy
