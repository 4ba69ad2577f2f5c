"""The process that runs a program for what it prints: nobody judges it, so there is no tester.

Nothing here needs to be believed: the program may change all of it, and then answers for itself.
"""

from __future__ import annotations

import ast
import linecache
import os
import sys
import traceback
from typing import Any

NAME = "program"


def run(job: dict[str, str], result: int) -> None:
    """Execute job["program"]; what it prints, and the traceback of what it raises, go to `result`
    as it goes on. Of a last line that is an expression the value is printed, as in a notebook."""
    how: dict[str, Any] = {"encoding": "utf-8", "errors": "replace", "buffering": 1}
    with open(result, "w", closefd=False, **how) as output, open(os.devnull) as nothing:
        sys.stdout = sys.stderr = output
        sys.stdin, sys.argv = nothing, [NAME]
        _run(job["program"])


def _run(program: str) -> None:
    # for the lines of a traceback, as of a module that was read from a file
    linecache.cache[NAME] = (len(program), None, program.splitlines(True), NAME)
    try:
        tree = ast.parse(program, NAME)
    except BaseException as error:  # too deep for the parser, too
        traceback.print_exception(type(error), error, None)
        return
    try:
        _execute(tree, {"__name__": "__main__", "__file__": NAME})
    except SystemExit as end:
        if end.code not in (None, 0):
            print(end.code)
    except BaseException as error:
        own = error.__traceback__ and error.__traceback__.tb_next  # without this function
        traceback.print_exception(type(error), error, own and own.tb_next)  # nor `_execute`


def _execute(tree: ast.Module, names: dict[str, Any]) -> None:
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
    exec(compile(tree, NAME, "exec", dont_inherit=True), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), NAME, "eval", dont_inherit=True), names)
        if value is not None:
            print(repr(value))
