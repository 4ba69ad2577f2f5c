"""What the installed vLLM's source says, read without importing it."""

from __future__ import annotations

import ast
import os
from importlib.util import find_spec
from pathlib import Path

import pytest


def vllm_folder() -> Path:
    """Skips where vLLM is not installed; in CI it must be."""
    spec = find_spec("vllm")
    if spec is None and not os.environ.get("CI"):
        pytest.skip("vLLM is not installed")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def source(name: str) -> str:
    return (vllm_folder() / name).read_text()


def fields_of(name: str, class_name: str) -> dict[str, str | None]:
    """Annotated fields of a class -> the source of their defaults."""
    (found,) = [
        node for node in ast.walk(ast.parse(source(name)))
        if isinstance(node, ast.ClassDef) and node.name == class_name
    ]  # fmt: skip
    return {
        node.target.id: node.value and ast.unparse(node.value)
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def functions(name: str, function_name: str) -> str:
    """The source of the functions and methods of this name."""
    text = source(name)
    found = [
        ast.get_source_segment(text, node) or "" for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.name == function_name
    ]  # fmt: skip
    assert found, f"{name} has no function {function_name} any more"
    return "\n".join(found)
