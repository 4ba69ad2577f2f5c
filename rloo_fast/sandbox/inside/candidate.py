"""The process that runs a candidate's program, and answers the tests' requests about it.

Nothing here needs to be believed: the program may change all of it, and then answers for itself.
"""

from __future__ import annotations

import importlib
import operator
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

from . import wire

MODULE = "candidate"  # so that `if __name__ == "__main__":` is skipped


def run(job: dict[str, str], requests: int, answers: int) -> None:
    """Execute job["setup"] and job["program"], report, then answer until the requests end."""
    module = sys.modules[MODULE] = ModuleType(MODULE)
    candidate = Candidate(vars(module))
    with suppress(BaseException):  # it may need names of the program: then it is the tests' alone
        exec(compile(job["setup"], "setup", "exec", dont_inherit=True), candidate.names)
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
        self._operations = {
            "execute": self._execute,
            "name": names.__getitem__,
            "call": lambda function, args, kwargs: function(*args, **kwargs),
            **{"getattr": getattr, "setattr": setattr, "getitem": operator.getitem},
            **{"setitem": operator.setitem, "len": len, "bool": bool, "str": str},
            **{"iter": iter, "next": next, "repr": repr, "isinstance": isinstance},
            **{name: getattr(operator, name) for name in wire.OPERATORS},
        }

    def _execute(self, program: str) -> None:
        # Not with this file's own `from __future__ import annotations`.
        exec(compile(program, MODULE, "exec", dont_inherit=True), self.names)

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
            return self.names[rest[0]]
        if tag == "library":
            return operator.attrgetter(rest[1])(importlib.import_module(rest[0]))
        kind, attributes = self.names[rest[0]], wire.decode(rest[1], self._object)
        copy = object.__new__(kind)
        vars(copy).update(attributes)
        return copy
