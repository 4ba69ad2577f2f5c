"""A class or table of a module, from the module's source, without importing what it imports.

Options are fields of a subclass of transformers.TrainingArguments; importing that takes seconds,
most of them torch's. Here a module's definitions are run one by one, when something asks for them:
the field of an Enum type runs that Enum, and torch, which only methods need, is never asked for.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
from pathlib import Path
from typing import Any

# packages that import torch, run from source; what else they name is imported
SLOW = (
    "transformers",
    "accelerate",
    *(f"rloo_fast.{x}" for x in ("config", "judges", "records", "reports", "rewards")),
)
NEVER = ("torch", "torch_xla", "vllm", "deepspeed")


class SourceError(Exception):
    """The source does not say it: import the module."""


def from_source(module: str, name: str) -> Any:
    """`name` of `module`, run from source. Raises SourceError."""
    try:
        return _namespace(module)[name]
    except SourceError:
        raise
    except Exception as error:  # whatever a definition does when its module is not run whole
        raise SourceError(f"{module}.{name}: {type(error).__name__}: {error}") from error


class _Namespace(dict[str, Any]):
    """A module's globals, each made when it is first looked up."""

    def __init__(self, module: str, path: Path) -> None:
        super().__init__(__name__=module, __builtins__=builtins)
        self.path = path
        self.package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        self.nodes: dict[str, ast.stmt] = {}  # name -> what defines or imports it
        self._collect(ast.parse(path.read_text(encoding="utf-8")).body)

    def _collect(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.If):  # `if TYPE_CHECKING`, `if is_accelerate_available()`
                self._collect(node.orelse)
                self._collect(node.body)
            elif isinstance(node, ast.Try):
                self._collect(node.body)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    self.nodes[alias.asname or alias.name.split(".")[0]] = node
            elif isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.nodes[node.name] = node
            else:
                for target in ast.walk(node):
                    if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                        self.nodes[target.id] = node

    def __missing__(self, name: str) -> Any:
        node = self.nodes.get(name)
        if node is None:
            raise KeyError(name)
        if isinstance(node, ast.Import | ast.ImportFrom):
            self[name] = self._imported(name, node)
            return self[name]
        if isinstance(node, ast.ClassDef):
            # what a class decides while it is made, as by the version of torch, is left out
            node.body = [part for part in node.body if not isinstance(part, ast.If)]
            # the body of a class looks names up without __missing__
            for used in _names_in_class(node) & self.nodes.keys() - {name}:
                self[used]
        # compiled without `from __future__ import annotations`: a field's type is an object
        code = compile(ast.Module([node], []), str(self.path), "exec", dont_inherit=True)
        exec(code, self)
        return self[name]

    def _imported(self, name: str, node: ast.Import | ast.ImportFrom) -> Any:
        alias = next(a for a in node.names if (a.asname or a.name.split(".")[0]) == name)
        if isinstance(node, ast.Import):
            return _module(alias.name if alias.asname else name)
        dots = "." * node.level
        module = importlib.util.resolve_name(dots + (node.module or ""), self.package)
        try:
            return getattr(_module(module), alias.name)
        except AttributeError:
            return _module(f"{module}.{alias.name}")


def _names_in_class(node: ast.ClassDef) -> set[str]:
    """Names that its body uses while the class is made; methods lose their annotations."""
    parts: list[ast.AST] = []
    for part in node.body:
        if isinstance(part, ast.FunctionDef):
            part.returns = None
            for argument in ast.walk(part.args):
                if isinstance(argument, ast.arg):  # of *args and **kwargs, too
                    argument.annotation = None
            defaults = [d for d in part.args.kw_defaults if d is not None]
            parts += [*part.decorator_list, *part.args.defaults, *defaults]
        else:
            parts.append(part)
    return {x.id for part in parts for x in ast.walk(part) if isinstance(x, ast.Name)}


class _Module:
    """A module whose attributes come from its source."""

    def __init__(self, namespace: _Namespace) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str) -> Any:
        try:
            return self._namespace[name]
        except KeyError:
            raise AttributeError(name) from None


_namespaces: dict[str, _Namespace] = {}


def _namespace(module: str) -> _Namespace:
    if module not in _namespaces:
        _namespaces[module] = _Namespace(module, _path(module))
    return _namespaces[module]


def _module(name: str) -> Any:
    if name.partition(".")[0] in NEVER:
        raise SourceError(f"{name} is needed.")
    if any(f"{name}.".startswith(f"{slow}.") for slow in SLOW):
        return _Module(_namespace(name))
    return importlib.import_module(name)


def _path(module: str) -> Path:
    """The file of a module, found without importing its package. Raises SourceError."""
    root, *rest = module.split(".")
    spec = importlib.util.find_spec(root)
    for folder in (spec and spec.submodule_search_locations) or ():
        place = Path(folder, *rest)
        for path in (place.with_suffix(".py") if rest else place, place / "__init__.py"):
            if path.is_file():
                return path
    raise SourceError(f"there is no source of {module}.")
