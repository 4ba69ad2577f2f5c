"""What tests of single functions use of pytest: see collected.py."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from .judged import Unaskable

NOT_HERE = ("asyncio", "filterwarnings", "skip", "skipif", "usefixtures", "xfail")  # marks


class Raises:
    """with raises(Kind or tuple of them, match=regular expression) as caught: ...; caught.value"""

    def __init__(self, kind: Any, match: str | None = None) -> None:
        self._kind, self._match = kind, match
        self.type: type[BaseException] | None = None
        self.value: BaseException | None = None

    def __enter__(self) -> Raises:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        assert error is not None, f"{self._kind} was not raised"
        if not isinstance(error, self._kind):
            return False
        self.type, self.value = type(error), error
        return self._match is None or self.match(self._match)

    def match(self, pattern: str) -> bool:
        assert re.search(pattern, str(self.value)), f"{self.value} does not match {pattern}"
        return True


def raises(
    kind: Any, *call: Any, match: str | None = None, **arguments: Any
) -> Raises:  # also raises(Kind, function, arguments of it)
    caught = Raises(kind, match)
    if call:
        with caught:
            call[0](*call[1:], **arguments)
    return caught


class Approx:
    """Equal to a number within max(rel * |expected|, abs); element by element for containers.

    rel: 1e-6, or 0 if abs is given alone; abs: 1e-12.
    """

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None) -> None:
        self._expected = expected
        self._rel = (1e-6 if abs is None else 0.0) if rel is None else rel
        self._abs = 1e-12 if abs is None else abs

    def __eq__(self, found: object) -> bool:
        return self._equal(self._expected, found)

    def _equal(self, expected: Any, found: Any) -> bool:
        if isinstance(expected, dict):
            return (
                isinstance(found, dict)
                and expected.keys() == found.keys()
                and all(self._equal(expected[key], found[key]) for key in expected)
            )
        if isinstance(expected, list | tuple):
            same = type(found) is type(expected) and len(found) == len(expected)
            return same and all(map(self._equal, expected, found))
        if isinstance(expected, int | float) and isinstance(found, int | float):
            return math.isclose(expected, found, rel_tol=self._rel, abs_tol=self._abs)
        return expected == found


class Case(NamedTuple):
    """pytest.param(*values)"""

    values: tuple[Any, ...]


def param(*values: Any, id: str | None = None, marks: Any = ()) -> Case:
    if marks:
        raise Unaskable("pytest.param's `marks` are not here")
    return Case(values)


class Mark:
    def parametrize(self, names: str | Sequence[str], values: Iterable[Any], **_: Any) -> Any:
        split = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        split = [name for name in split if name]

        def values_of(case: Any) -> Sequence[Any]:
            if isinstance(case, Case):
                return case.values
            return case if len(split) > 1 else (case,)

        cases = [values_of(case) for case in values]
        if not cases:
            raise Unaskable(f"pytest.mark.parametrize has no cases of {', '.join(split)}")

        def decorate(test: Any) -> Any:
            test.parameters = [*getattr(test, "parameters", []), (split, cases)]
            return test

        return decorate

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A mark of the test's own, which changes nothing."""
        if name in NOT_HERE:
            raise Unaskable(f"pytest.mark.{name} is not here")
        return lambda *args, **_: args[0] if args and callable(args[0]) else lambda test: test


class Pytest(ModuleType):
    """`main`: the tests are collected and run in any case."""

    raises, approx, mark, param = staticmethod(raises), Approx, Mark(), staticmethod(param)
    main = staticmethod(lambda *_, **__: 0)

    @staticmethod
    def fail(reason: str = "", **_: Any) -> None:
        raise AssertionError(reason)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Unaskable(f"pytest.{name} is not here")
