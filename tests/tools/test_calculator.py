"""The calculator computes arithmetic, in bounded time, and nothing else."""

from __future__ import annotations

import pytest

from rloo_fast.tools import RunTools
from rloo_fast.tools.calculator import calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("37*84", "3108"),
        (" (2 + 3) * -4 ", "-20"),
        ("7 / 2", "3.5"),
        ("7 // 2 + 7 % 4", "6"),
        ("2 ** 10", "1024"),
        ("2 ** -1", "0.5"),
        ("1.5 * 2", "3.0"),
    ],
)
def test_arithmetic(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("__import__('os')", "only numbers"),
        ("[1]*10**9", "only numbers"),
        ("'a' * 3", "only numbers"),
        ("True + 1", "only numbers"),
        ("1 if 1 else 2", "only numbers"),
        ("9**9**9", "more than 1000 digits"),
        ("9" * 1001, "at most 1000 characters"),
        ("2 +", "not an arithmetic expression"),
        ("", "not an arithmetic expression"),
        ("(-8) ** 0.5", "root of a negative number"),
        ("(" * 400 + "1" + ")" * 400, "not an arithmetic expression"),
    ],
)
def test_what_is_no_arithmetic_is_refused(expression, message):
    with pytest.raises((ValueError, MemoryError), match=message):
        calculator(expression)


def test_it_is_known_by_its_name():
    ((tools, _),) = RunTools("calculator").open([{"prompt": [{"role": "user", "content": "x"}]}])
    assert tools.start("calculator", {"expression": "6*7"}).result(5).content == "42"
    assert tools.start("calculator", {"expression": "1/0"}).result(5).failed
