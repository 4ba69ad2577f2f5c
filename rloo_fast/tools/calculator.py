"""The tool `calculator`: arithmetic, and nothing else that Python could do."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

MAX_DIGITS = 1000  # of a number on the way
MAX_LENGTH = 1000  # characters

BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
SIGNS: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % ** and parentheses, such as (2 + 3) * 4.

    Returns:
        The value.
    """
    if not isinstance(expression, str) or len(expression) > MAX_LENGTH:
        raise ValueError(f"expression must be a text of at most {MAX_LENGTH} characters")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"{expression!r:.80} is not an arithmetic expression") from error
    return str(value)


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant):
        number: Any = node.value
        if type(number) in (int, float):
            return _bounded(number)
    if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        return SIGNS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in BINARY:
            return _bounded(BINARY[type(node.op)](left, right))
    raise ValueError(
        f"only numbers, + - * / // % ** and parentheses, not {ast.unparse(node)!r:.80}"
    )


def _power(base: int | float, exponent: int | float) -> int | float:
    """Checked before it is computed: it may have any number of digits."""
    whole = isinstance(base, int) and isinstance(exponent, int) and exponent > 0
    if whole and int(base).bit_length() * exponent > MAX_DIGITS * 4:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError("the root of a negative number")
    return _bounded(value)


def _bounded(value: int | float) -> int | float:
    if isinstance(value, int) and value.bit_length() > MAX_DIGITS * 4:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    return value
