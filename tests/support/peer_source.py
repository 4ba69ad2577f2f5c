"""Signatures in a peer's source, read without importing it: most of them need a GPU for that."""

from __future__ import annotations

import ast
import inspect
import os
from importlib.util import find_spec
from pathlib import Path

import pytest


def module_path(module: str) -> Path:
    """The module's file: that of an installed package, or of one in the folder RLOO_PEERS.

    Skips where there is neither; in CI there must be.
    """
    package = module.split(".")[0]
    folders = [Path(os.environ["RLOO_PEERS"])] if os.environ.get("RLOO_PEERS") else []
    if (spec := find_spec(package)) is not None and spec.submodule_search_locations:
        folders.insert(0, Path(spec.submodule_search_locations[0]).parent)
    for folder in folders:
        base = folder.joinpath(*module.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.exists():
                return path
    if os.environ.get("CI"):
        raise AssertionError(f"{module} is neither installed nor in RLOO_PEERS")
    pytest.skip(f"{package} is neither installed nor in the folder RLOO_PEERS")


def signature(module: str, name: str) -> inspect.Signature:
    """What `module.name(...)` takes, or of an autograd.Function `module.name.apply(...)`."""
    path = module_path(module)
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _of(node.args, skip=0)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(node)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return signature(module, ast.unparse(node.value).removesuffix(".apply"))
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return signature(_absolute(module, path, node), alias.name)
    raise AssertionError(f"{module} has no {name}: the peer has changed")


def _of_class(node: ast.ClassDef) -> inspect.Signature:
    methods = {x.name: x for x in node.body if isinstance(x, ast.FunctionDef)}
    if "apply" in methods:
        return _of(methods["apply"].args, skip=0)
    chosen = "forward" if "autograd.Function" in map(ast.unparse, node.bases) else "__init__"
    chosen = chosen if chosen in methods else "forward"
    return _of(methods[chosen].args, skip=1)  # ctx, cls or self


def _absolute(module: str, path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        assert node.module is not None
        return node.module
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + (path.name == "__init__.py")]
    return ".".join([*parts, *(node.module or "").split(".")]).rstrip(".")


def _of(args: ast.arguments, skip: int) -> inspect.Signature:
    kinds, places = inspect.Parameter, [*args.posonlyargs, *args.args]
    first_default = len(places) - len(args.defaults)
    found = [
        kinds(
            x.arg,
            kinds.POSITIONAL_OR_KEYWORD,
            default=... if i >= first_default else kinds.empty,
        )
        for i, x in enumerate(places)
    ][skip:]
    for x, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found.append(
            kinds(x.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else ...)
        )
    if args.vararg:
        found.insert(len(places) - skip, kinds(args.vararg.arg, kinds.VAR_POSITIONAL))
    if args.kwarg:
        found.append(kinds(args.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)
