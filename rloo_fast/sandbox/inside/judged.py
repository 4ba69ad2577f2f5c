"""A test's text as it is run: with a note of every assert that fails and every function that runs.

A test can pass without having judged anything: by functions that nobody calls, by a handler around
its asserts, by a comparison without `assert`. Such a test is an error of its row, or failed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import CodeType
from typing import Any

JUDGE = "__judge__"  # the name in the test's own names
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Unaskable(BaseException):
    """A test cannot be asked here, whatever the program. `except Exception` does not catch it."""


class Judge:
    """What has come of a test, whatever its text makes of that.

    `problem`: the first failed assert, failure of a unittest or fault of the pipe.
    """

    def __init__(self) -> None:
        self.problem: BaseException | None = None
        self._waiting: dict[int, str] = {}  # functions with asserts that have not run: their names

    def code(self, text: str, name: str) -> CodeType:
        """The text compiled. Of one with the name "test" all functions with asserts must run."""
        try:
            tree = ast.parse(text)
            nodes = list(ast.walk(tree))
            for node in nodes:
                if isinstance(node, ast.Assert):
                    self._note_assert(node)
            if name == "test":
                _check(nodes)
                for node in nodes:
                    if isinstance(node, Function) and any(map(_judges, _own(node))):
                        self._note_function(node)
            # Not with this file's own `from __future__ import annotations`.
            return compile(tree, name, "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise Unaskable(f"{type(error).__name__} in the {name}: {error}") from error

    def conclude(self) -> None:
        """Raises what is wrong with the program, or with the test."""
        if self.problem is not None:
            raise self.problem
        for name in self._waiting.values():
            raise Unaskable(f"{name}, which asserts something, is not run")

    def fault(self, error: BaseException) -> BaseException:
        self.problem = self.problem or error
        return error

    def asserted(self, value: Any) -> bool:
        true = bool(value)
        if not true:
            self.fault(AssertionError())
        return true

    def entered(self, number: int) -> None:
        self._waiting.pop(number, None)

    def _note_assert(self, node: ast.Assert) -> None:
        if isinstance(node.test, ast.Tuple) and node.test.elts:
            raise Unaskable("it asserts a tuple, which is always true: no parentheses there")
        node.test = _call("asserted", node.test, node.test)

    def _note_function(self, node: Function) -> None:
        number = len(self._waiting)
        self._waiting[number] = node.name
        place = 1 if ast.get_docstring(node, clean=False) is not None else 0
        call = _call("entered", _at(ast.Constant(number), node), node)
        node.body.insert(place, _at(ast.Expr(call), node))


def _check(nodes: list[ast.AST]) -> None:
    """Raises Unaskable for what would pass whatever the program does."""
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.AsyncFunctionDef):
            raise Unaskable(f"{node.name} is asynchronous, and there is no event loop here")
        if isinstance(node, ast.Module):
            _check_lines(node.body)
        if isinstance(node, ast.FunctionDef) and node.name.startswith(("test", "check")):
            _check_lines(node.body)
            returned = [line.value for line in _own(node) if isinstance(line, ast.Return)]
            if node.name not in used and any(map(_is_verdict, returned)):
                raise Unaskable(f"{node.name} returns a comparison, which nobody asserts")


def _check_lines(lines: list[ast.stmt]) -> None:
    if any(isinstance(line, ast.Expr) and isinstance(line.value, ast.Compare) for line in lines):
        raise Unaskable("it compares without an assert")


def _is_verdict(value: ast.AST | None) -> bool:
    return isinstance(value, ast.Compare | ast.BoolOp)


def _own(function: Function) -> Iterator[ast.AST]:
    """The nodes of its body, without those of functions and classes in it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, Function | ast.ClassDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def _judges(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
        return name.startswith("assert") or name in ("raises", "fail")
    return isinstance(node, ast.Assert)


def _call(method: str, argument: ast.expr, place: ast.AST) -> ast.Call:
    judge = _at(ast.Name(JUDGE, ast.Load()), place)
    return _at(
        ast.Call(_at(ast.Attribute(judge, method, ast.Load()), place), [argument], []), place
    )


def _at(node: Any, place: ast.AST) -> Any:
    return ast.copy_location(node, place)
