"""No text becomes code in this process but arithmetic: for verifiers that call eval on an answer.

Some verifiers take an answer apart with `eval` or with sympy's `parse_expr`, which calls it. Python
tells an audit hook of every code object before it is run (PEP 578; a hook cannot be removed). Code
made of a string is let through only if all names in it, attributes included, are those of
arithmetic and of elementary functions, and if it defines no function: `2*x + sqrt(3)` and
`[[1, 2], [3, 4]]` are, `().__class__`, `open("x")` and `lambda: 0` are not. Code that was read from
a file is not text.
"""

from __future__ import annotations

import keyword
import sys
from types import CodeType
from typing import Any

FROM_TEXT = ("<string>", "<stdin>")  # the file names of code that eval and exec make
# What sympy's parser writes around the parts of an expression; what it is made of
PARSER = {"Symbol", "Function", "Integer", "Float", "Rational", "factorial", "factorial2"}
NUMBERS = {"pi", "E", "I", "oo", "nan", "zoo", "true", "false", "Add", "Mul", "Pow", "Mod"}
NUMBERS |= {"Abs", "sign", "Min", "Max", "floor", "ceiling", "frac", "gcd", "lcm", "binomial"}
FUNCTIONS = {"sqrt", "cbrt", "root", "real_root", "exp", "log", "ln", "gamma", "erf", "erfc"}
FUNCTIONS |= {"sin", "cos", "tan", "cot", "sec", "csc", "sinc", "asin", "acos", "atan", "acot"}
FUNCTIONS |= {"asec", "acsc", "atan2", "sinh", "cosh", "tanh", "coth", "sech", "csch", "asinh"}
FUNCTIONS |= {"acosh", "atanh", "acoth", "re", "im", "arg", "conjugate"}
OTHERS = {"Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Matrix", "Tuple", "Interval"}
OTHERS |= {"FiniteSet", "Union", "evaluate"}
ALLOWED = PARSER | NUMBERS | FUNCTIONS | OTHERS
SYMPYS_OWN = compile("from sympy import *", "<string>", "exec", dont_inherit=True)
MAX_CODE_BYTES = 100_000


class Refused(ValueError):
    """An answer that would be run as a program."""


def set_up() -> None:
    """For the rest of this process's life. What is imported later must come from files."""
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "exec" and isinstance(code := arguments[0], CodeType):
        if code.co_filename in FROM_TEXT and not is_arithmetic(code):
            raise Refused(f"text that is no arithmetic is not run as code: {code.co_names[:5]}")
    elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        raise Refused(f"a verifier starts no program ({event})")


def is_arithmetic(code: CodeType) -> bool:
    """Whether the code does no more than call elementary functions; see the module."""
    if _parts(code) == _parts(SYMPYS_OWN):  # what its parse_expr runs first
        return True
    if len(code.co_code) > MAX_CODE_BYTES or any(isinstance(c, CodeType) for c in code.co_consts):
        return False
    return all(name in ALLOWED or _is_variable(name) for name in code.co_names)


def _parts(code: CodeType) -> tuple[Any, ...]:
    return code.co_code, code.co_names, code.co_consts


def _is_variable(name: str) -> bool:
    """One letter, perhaps with a number: x, y1."""
    return name[:1].isalpha() and not name[1:].strip("0123456789") and not keyword.iskeyword(name)
