"""What a program may have of the setup of its tests. The rest may hold answers: it is the tests'.

Read from the source alone, nothing is run. Before it runs, a program is given the imports and the
classes that only hold data (`ListNode`), if nothing in them could be an answer: no value but None,
True, False, 0, 1, -1 and empty ones, in an Enum also its members' numbers and names. What a test
sends it (a function of the setup, an object of one of its classes), it is given then, with what
that needs. Docstrings are not given.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

# A class that only holds data defines no more than these.
DATA_METHODS = {"__init__", "__post_init__", "__repr__", "__str__", "__eq__", "__ne__", "__lt__"}
DATA_METHODS |= {"__le__", "__gt__", "__ge__", "__hash__", "__bool__", "__len__", "__iter__"}
TEXT_METHODS = {"__repr__", "__str__"}  # of text that is shown
NAMING = {"__slots__", "__match_args__"}
Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Setup:
    """The statements of a setup and the names that each binds and uses.

    A setup with a syntax error has no statements: the tester says so.
    """

    def __init__(self, source: str) -> None:
        try:
            self._statements = ast.parse(source).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            self._statements = []
        for statement in self._statements:
            _remove_docstrings(statement)
        self._bound = [set(_bound(statement)) for statement in self._statements]
        self._defined = set().union(*self._bound)
        self._used = [_loaded(statement) & self._defined for statement in self._statements]

    def shared(self) -> str:
        """The source that a program is given before it runs."""
        kept = {n for n, statement in enumerate(self._statements) if _imports(statement)}
        kept |= {n for n, statement in enumerate(self._statements) if _only_data(statement)}
        while True:  # without those that need what is not given
            given = set().union(*(self._bound[n] for n in kept))
            without = {n for n in kept if not self._used[n] <= given}
            if not without:
                return self._source(kept)
            kept -= without

    def closure(self, name: str) -> str:
        """The source of every statement that binds `name`, and of what those use."""
        kept, wanted = set[int](), {name}
        while True:
            found = {n for n, bound in enumerate(self._bound) if bound & wanted} - kept
            if not found:
                return self._source(kept)
            kept |= found
            wanted = set().union(*(self._used[n] for n in found))

    def _source(self, kept: set[int]) -> str:
        statements = [self._statements[n] for n in sorted(kept)]
        return ast.unparse(ast.Module(body=statements, type_ignores=[]))


def _bound(node: ast.AST) -> Iterator[str]:
    """Names that a statement binds at the level of the module."""
    if isinstance(node, Scope):
        yield node.name
        return
    if isinstance(node, ast.alias):
        yield node.asname or node.name.split(".")[0]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    if not isinstance(node, ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _bound(child)


def _loaded(statement: ast.stmt) -> set[str]:
    names = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Load)}


def _imports(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Import | ast.ImportFrom)


def _only_data(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.ClassDef):
        return False
    derived = bool(statement.bases or statement.decorator_list)  # Enum, NamedTuple, dataclass
    holds_data = all(_holds_data(line, derived) for line in statement.body)
    return holds_data and not any(map(_could_be_an_answer, _values(statement)))


def _holds_data(line: ast.stmt, derived: bool) -> bool:
    if isinstance(line, ast.FunctionDef):
        return line.name in DATA_METHODS
    if isinstance(line, ast.Assign):
        return derived or ast.unparse(line.targets[0]) in NAMING
    if isinstance(line, ast.AnnAssign):
        return derived or line.value is None
    return isinstance(line, ast.Pass)


def _values(statement: ast.ClassDef) -> Iterator[object]:
    """The constants in a class, but for annotations, names of fields, texts that are shown, and
    the members of an Enum (numbers up to their count; their names)."""
    members = {t.id.lower(): n + 1 for n, t in enumerate(_targets(statement))}
    is_enum = any(
        "Enum" in ast.unparse(base) or "Flag" in ast.unparse(base) for base in statement.bases
    )
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Constant):
            ordinal = isinstance(node.value, int) and 0 <= node.value <= len(members)
            named = isinstance(node.value, str) and node.value.lower() in members
            if not (is_enum and (ordinal or named)):
                yield node.value
        elif isinstance(node, ast.AnnAssign):
            waiting += [node.value] if node.value else []
        elif isinstance(node, ast.FunctionDef):
            waiting += [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            waiting += [] if node.name in TEXT_METHODS else node.body
        elif isinstance(node, ast.Raise) or _names_fields(node):
            continue
        else:
            waiting += ast.iter_child_nodes(node)


def _could_be_an_answer(value: object) -> bool:
    if isinstance(value, int | float | complex):
        return abs(value) > 1
    if isinstance(value, str | bytes):
        return bool(value) and value not in ("inf", "-inf", "nan")
    return value is not None and value is not ...


def _targets(statement: ast.ClassDef) -> Iterator[ast.Name]:
    for line in statement.body:
        if isinstance(line, ast.Assign):
            yield from (target for target in line.targets if isinstance(target, ast.Name))


def _names_fields(node: ast.AST) -> bool:
    """__slots__ = ..., namedtuple("Point", "x y")"""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).split(".")[-1] in ("namedtuple", "NamedTuple")
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in NAMING


def _remove_docstrings(statement: ast.stmt) -> None:
    for node in ast.walk(statement):
        if isinstance(node, Scope) and ast.get_docstring(node, clean=False) is not None:
            node.body[0] = ast.Pass()
