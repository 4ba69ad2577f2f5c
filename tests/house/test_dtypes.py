"""No tensor of ours takes its dtype from torch.set_default_dtype."""

from __future__ import annotations

import ast

import pytest

from tests.support.paths import ROOT

MAKE_FLOATS = {"zeros", "ones", "empty", "full", "rand", "randn", "normal", "linspace", "eye"}
MAY_MAKE_FLOATS = {"tensor", "as_tensor", "arange", "scalar_tensor"}
FILES = [
    path
    for folder in ("rloo_fast", "kernels/rloo_kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def of_default_dtype(source: str) -> list[int]:
    """Lines of the calls of torch that make a tensor of the default dtype."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and not any(keyword.arg == "dtype" for keyword in node.keywords)
        and (
            node.func.attr in MAKE_FLOATS
            or (node.func.attr in MAY_MAKE_FLOATS and any(map(_is_float, ast.walk(node))))
        )
    ]


def _is_float(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, float)


def test_every_tensor_that_may_hold_floats_names_its_dtype():
    found = {str(path): of_default_dtype(path.read_text(encoding="utf-8")) for path in FILES}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("call", "is_found"),
    [
        ("torch.zeros(3)", True),
        ("torch.full((2,), nan, device=d)", True),
        ("torch.tensor([0.5])", True),
        ("torch.zeros(3, dtype=torch.float32)", False),
        ("torch.tensor([1, 2])", False),
        ("x.new_zeros(3)", False),
    ],
)
def test_what_is_looked_for(call, is_found):
    assert bool(of_default_dtype(call)) == is_found
