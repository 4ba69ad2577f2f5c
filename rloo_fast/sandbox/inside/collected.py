"""Tests in the style of unittest and pytest: defined by a test's text, and called by nobody in it.

Of pytest there is what tests of single functions use: plain `test_...` functions and `Test...`
classes, `raises`, `approx`, `fail`, `param` and `mark.parametrize`. Fixtures are not.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from .judged import Judge, Unaskable
from .pytest_names import Pytest


class Collected:
    """The tests of one text, whose names are `names`."""

    def __init__(self, judge: Judge, names: Mapping[str, Any]) -> None:
        self._judge, self._names = judge, names
        self._started: set[type] = set()  # unittest's cases

    def prepare(self, texts: Sequence[str]) -> None:
        """Before the texts run: `unittest` and `pytest` work inside them, if they name them."""
        if any("unittest" in text for text in texts):
            self._watch_unittest()
        if any("doctest" in text for text in texts):
            self._watch_doctest()
        if any("pytest" in text for text in texts):
            sys.modules["pytest"] = Pytest("pytest")

    def run(self, text: str) -> None:
        """Call the tests that the text defines and does not call. Raises what a failure did."""
        tree = ast.parse(text)
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        mentioned = {node.id for node in nodes if isinstance(node.ctx, ast.Load)}
        for node in _definitions(tree.body):
            value = self._names.get(node.name)
            if _is_case(value):
                self._run_cases([value])
            elif node.name in mentioned or value is None:
                continue
            elif isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                _call(value, {})
            elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                _call_methods(value)

    def _run_cases(self, values: Iterable[Any]) -> None:
        """Run every unittest.TestCase among the values that has not run."""
        import unittest

        for value in [v for v in values if _is_case(v) and v not in self._started]:
            unittest.defaultTestLoader.loadTestsFromTestCase(value).run(unittest.TestResult())

    def _watch_unittest(self) -> None:
        """What comes of a case is known, whoever runs it, and with whichever result."""
        import unittest

        judge, started = self._judge, self._started

        def watch(name: str, note: Callable[..., None]) -> None:
            method = getattr(unittest.TestResult, name)

            def watched(result: Any, *arguments: Any) -> None:
                note(*arguments)
                method(result, *arguments)

            setattr(unittest.TestResult, name, watched)

        def failed(test: Any, error: Any) -> None:
            judge.fault(error[1])

        def subtest(test: Any, part: Any, error: Any) -> None:
            if error is not None:
                judge.fault(error[1])

        def skipped(test: Any, why: object) -> None:
            judge.fault(Unaskable(f"{_name(test)} is skipped, or is to fail"))

        def passed_by_surprise(test: Any) -> None:
            judge.fault(Unaskable(f"{_name(test)} is to fail, and passes"))

        watch("startTest", lambda test: started.add(type(test)))
        watch("addError", failed)
        watch("addFailure", failed)
        watch("addSubTest", subtest)
        watch("addSkip", skipped)
        watch("addExpectedFailure", skipped)
        watch("addUnexpectedSuccess", passed_by_surprise)
        main = lambda *args, **kwargs: self._run_cases(list(self._names.values()))  # noqa: E731
        setattr(unittest, "main", main)  # noqa: B010

    def _watch_doctest(self) -> None:
        import doctest

        run = doctest.DocTestRunner.run

        def watched(runner: Any, *args: Any, **kwargs: Any) -> Any:
            results = run(runner, *args, **kwargs)
            if results.failed:
                self._judge.fault(AssertionError())
            return results

        setattr(doctest.DocTestRunner, "run", watched)  # noqa: B010


def _definitions(body: Iterable[ast.AST]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Of the module's level, also those in its `if`, `try`, `with` and loops."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
        elif isinstance(node, ast.stmt | ast.ExceptHandler):
            yield from _definitions(ast.iter_child_nodes(node))


def _is_case(value: Any) -> bool:
    unittest = sys.modules.get("unittest")
    return unittest is not None and isinstance(value, type) and issubclass(value, unittest.TestCase)


def _name(test: Any) -> str:
    return getattr(test, "_testMethodName", type(test).__name__)


def _call_methods(kind: Any) -> None:
    getattr(kind, "setup_class", lambda: None)()
    names = dict.fromkeys(name for base in reversed(kind.__mro__) for name in vars(base))
    for name in [name for name in names if name.startswith("test")]:
        for of_class in _arguments(kind):
            made = kind()
            test = getattr(made, name)
            setup = getattr(made, "setup_method", lambda: None)
            setup(*[test][: len(inspect.signature(setup).parameters)])
            _call(test, of_class)
            getattr(made, "teardown_method", lambda *_: None)()


def _call(test: Callable[..., Any], of_class: Mapping[str, Any]) -> None:
    """of_class: arguments by the marks of its class."""
    for arguments in _arguments(test):
        arguments |= of_class
        try:
            inspect.signature(test).bind(**arguments)
        except TypeError as error:
            raise Unaskable(f"{test.__name__} is given nothing here: {error}") from error
        test(**arguments)


def _arguments(marked: Any) -> Iterator[dict[str, Any]]:
    """The product of the cases of all `mark.parametrize` on it, {} without one."""
    tables = getattr(marked, "parameters", [])
    rows = ([dict(zip(names, case, strict=True)) for case in values] for names, values in tables)
    for cases in product(*rows):
        yield {name: value for case in cases for name, value in case.items()}
